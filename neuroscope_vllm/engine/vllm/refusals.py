"""Configurations we can not serve truthfully, and ones that make features less certain."""

from __future__ import annotations

import os

from vllm.config import VllmConfig

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.engine.vllm import compat
from neuroscope_vllm.engine.vllm.models import SERVED

_AUXILIARY = ("eagle3", "dflash", "dspark", "extract_hidden_states")
"""Speculative methods, by vLLM's names."""


def check_served(vllm_config: VllmConfig) -> None:
    """Raises ConfigError with the reason if the stream could not be trusted."""
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    architecture = model.architecture
    if architecture not in SERVED:
        raise ConfigError(
            f"{architecture} is not a supported architecture; neuroscope observes"
            f" {', '.join(SERVED)}, so serve such a model or leave neuroscope unconfigured."
        )
    reasons = {
        "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND) makes requests where their options are not"
        " read": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
        "dual-batch overlap (--enable-dbo) runs each layer on half batches, so rows can not be"
        " told apart": parallel.use_ubatching,
        "decode context parallelism splits a request's rows over ranks": (
            parallel.decode_context_parallel_size > 1
        ),
        "prefill context parallelism splits a request's rows over ranks": (
            parallel.prefill_context_parallel_size > 1
        ),
        "sequence parallelism shards the residual stream over ranks": (
            compat.sequence_parallel(vllm_config)
        ),
        "adaptive draft verification leaves row boundaries on the GPU": (
            compat.adaptive_verification(vllm_config)
        ),
        "drafting takes auxiliary hidden states from the decoder loop we replace, with"
        f" {', '.join(_AUXILIARY)}": (speculative is not None and speculative.method in _AUXILIARY),
        "sleep mode (--enable-sleep-mode) may drop the SAE's weights with the model's": (
            model.enable_sleep_mode
        ),
    }
    for reason, refused in reasons.items():
        if refused:
            raise ConfigError(f"neuroscope can not serve this configuration: {reason}.")


def warnings(vllm_config: VllmConfig) -> list[str]:
    """Sentences for the log and for /v1/features/describe."""
    found = []
    if vllm_config.lora_config is not None:
        found.append("LoRA adapters shift the residual stream; features of adapted requests drift.")
    quantization = vllm_config.model_config.quantization
    if quantization is not None and any(q in quantization for q in ("awq", "gptq", "int4")):
        found.append(f"{quantization} weights change activations; expect features to drift.")
    return found
