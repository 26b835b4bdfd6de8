"""Llama, and what loads as LlamaForCausalLM (SmolLM2), with the hook in its decoder loop."""

from __future__ import annotations

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.models import llama

from neuroscope_vllm.engine.vllm.models.decoder import (
    DYNAMIC_DIMS,
    ObservedDecoder,
    ObservedForCausalLM,
)


@support_torch_compile(dynamic_arg_dims=DYNAMIC_DIMS)
class ObservedLlamaModel(ObservedDecoder, llama.LlamaModel):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


class ObservedLlamaForCausalLM(ObservedForCausalLM, llama.LlamaForCausalLM):
    observed = (llama, "LlamaModel", ObservedLlamaModel)
