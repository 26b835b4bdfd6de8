"""vLLM model classes whose decoder loop calls an ActivationHook. One family a file."""

OBSERVED = {
    "Gemma2ForCausalLM": "neuroscope_vllm.engine.vllm.models.gemma2:ObservedGemma2ForCausalLM",
    "Gemma3ForCausalLM": "neuroscope_vllm.engine.vllm.models.gemma3:ObservedGemma3ForCausalLM",
    "LlamaForCausalLM": "neuroscope_vllm.engine.vllm.models.llama:ObservedLlamaForCausalLM",
}
"""Architecture in a model's config.json -> our class, which is registered in vLLM's stead."""

SERVED = (*OBSERVED, "Gemma3ForConditionalGeneration")
"""Architectures that are observed: those, and models that build one of them inside through vLLM's
registry. Anything else is refused at start."""
