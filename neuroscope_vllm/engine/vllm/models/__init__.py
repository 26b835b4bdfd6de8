"""vLLM model classes whose decoder loop calls an ActivationHook. One family a file."""

OBSERVED = {
    "Gemma2ForCausalLM": "neuroscope_vllm.engine.vllm.models.gemma2:ObservedGemma2ForCausalLM",
    "LlamaForCausalLM": "neuroscope_vllm.engine.vllm.models.llama:ObservedLlamaForCausalLM",
}
"""Architecture in a model's config.json -> our class. Anything else is refused at start."""
