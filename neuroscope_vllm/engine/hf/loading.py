"""Models of transformers, and where they keep their layers."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from neuroscope_vllm.core.errors import ConfigError, EngineError
from neuroscope_vllm.engine.hf.device import ON_CPU, Placement, is_out_of_memory, place
from neuroscope_vllm.engine.hf.gguf import quiet_transformers

logger = logging.getLogger(__name__)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, a folder or hub id, as transformers reads it."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model)


def load_config(model: str) -> Any:
    """Raises ConfigError as `load_whole`."""
    transformers = _transformers()
    if model.startswith((os.sep, ".", "~")) and not os.path.isdir(model):
        raise ConfigError(f"model {model} is no folder; give one, or a hub id.")
    with _loading(model):
        return transformers.AutoConfig.from_pretrained(model)


def placed(model: str, device: str = "auto", dtype: str = "auto") -> Placement:
    """Where and how to run it; see `device.place`."""
    config = load_config(model)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else None
    found = place(device, dtype, checkpoint=stored, model_type=config.model_type)
    if found.note:
        logger.warning("neuroscope: %s", found.note)
    return found


def load_whole(model: str, placement: Placement = ON_CPU) -> tuple[Any, Any]:
    """A causal language model with eager attention, and its tokenizer.

    Raises:
        ConfigError: transformers is not installed, or the model can not be loaded.
        EngineError: The device has no room for it.
    """
    transformers = _transformers()
    with _loading(model, placement), quiet_transformers():
        whole = transformers.AutoModelForCausalLM.from_pretrained(
            model,
            dtype=placement.dtype,
            # Others leave out Gemma 2's soft capping.
            attn_implementation="eager",
        )
        tokenizer = load_tokenizer(model)
        return whole.eval().to(placement.device), tokenizer


@contextlib.contextmanager
def _loading(model: str, placement: Placement = ON_CPU) -> Iterator[None]:
    # What a broken folder raises is not documented, and differs by what is broken.
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            dtype = str(placement.dtype).removeprefix("torch.")
            raise EngineError(
                f"model {model} does not fit the {placement.device.type} device in {dtype}; use a"
                " shorter --dtype, or a smaller model."
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"model {model} can not be loaded with transformers ({reason}); give the folder or hub"
            " id of one (with --model where a command has it)."
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "running a model here needs transformers, which is not installed;"
            " pip install 'neuroscope-vllm[hf]'."
        ) from None
    return transformers


def decoder_layers(whole: Any, model: str) -> nn.ModuleList:
    """Raises ConfigError: they are not where Llama and Gemma have them."""
    layers = getattr(whole.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"model {model} ({type(whole).__name__}) keeps its decoder layers where they are not"
            " found; take a Llama or Gemma model."
        )
    return layers
