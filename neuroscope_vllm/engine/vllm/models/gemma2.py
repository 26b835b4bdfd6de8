"""Gemma 2, with the activation hook in its decoder loop."""

from __future__ import annotations

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.models import gemma2

from neuroscope_vllm.engine.vllm.models.decoder import (
    DYNAMIC_DIMS,
    ObservedDecoder,
    ObservedForCausalLM,
)


@support_torch_compile(dynamic_arg_dims=DYNAMIC_DIMS)
class ObservedGemma2Model(ObservedDecoder, gemma2.Gemma2Model):
    pass


class ObservedGemma2ForCausalLM(ObservedForCausalLM, gemma2.Gemma2ForCausalLM):
    observed = (gemma2, "Gemma2Model", ObservedGemma2Model)
