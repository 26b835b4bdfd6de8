"""Gemma 2, with the activation hook in its decoder loop."""

from __future__ import annotations

from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models import gemma2

from neuroscope_vllm.engine.vllm.models.decoder import (
    DYNAMIC_DIMS,
    ObservedDecoder,
    ObservedForCausalLM,
    building_with,
)


@support_torch_compile(dynamic_arg_dims=DYNAMIC_DIMS)
class ObservedGemma2Model(ObservedDecoder, gemma2.Gemma2Model):
    pass


class ObservedGemma2ForCausalLM(ObservedForCausalLM, gemma2.Gemma2ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with building_with(gemma2, "Gemma2Model", ObservedGemma2Model):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
