"""Gemma 3, with the activation hook in its decoder loop.

Also where vLLM wraps it: `Gemma3ForConditionalGeneration` has its language model built through
vLLM's registry, so what is registered as Gemma3ForCausalLM is what it runs.
"""

from __future__ import annotations

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.models import gemma3

from neuroscope_vllm.engine.vllm.models.decoder import (
    DYNAMIC_DIMS,
    ObservedDecoder,
    ObservedForCausalLM,
)


@support_torch_compile(dynamic_arg_dims=DYNAMIC_DIMS)
class ObservedGemma3Model(ObservedDecoder, gemma3.Gemma3Model):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


class ObservedGemma3ForCausalLM(ObservedForCausalLM, gemma3.Gemma3ForCausalLM):
    observed = (gemma3, "Gemma3Model", ObservedGemma3Model)
