"""Gemma 3, with the activation hook in its decoder loop.

Also where vLLM wraps it: `Gemma3ForConditionalGeneration` has its language model built through
vLLM's registry, so what is registered as Gemma3ForCausalLM is what it runs.
"""

from __future__ import annotations

from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models import gemma3

from neuroscope_vllm.engine.vllm.models.decoder import (
    DYNAMIC_DIMS,
    ObservedDecoder,
    ObservedForCausalLM,
    building_with,
)


@support_torch_compile(dynamic_arg_dims=DYNAMIC_DIMS)
class ObservedGemma3Model(ObservedDecoder, gemma3.Gemma3Model):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


class ObservedGemma3ForCausalLM(ObservedForCausalLM, gemma3.Gemma3ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with building_with(gemma3, "Gemma3Model", ObservedGemma3Model):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
