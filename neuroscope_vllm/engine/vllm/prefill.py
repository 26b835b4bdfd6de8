"""Plain vLLM prefill at the model's full depth: what a corpus pass is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from neuroscope_vllm.engine.protocol import Chunk
from neuroscope_vllm.engine.vllm.engine import (
    LLM,
    SamplingParams,
    TokensPrompt,
    parse_flags,
)


class Prefill:
    """vLLM's own engine, without the plugin's hook, without prefix caching."""

    def __init__(self, model: str, max_tokens: int, vllm_flags: Sequence[str] = ()) -> None:
        arguments = parse_flags(model, vllm_flags)
        arguments.enable_prefix_caching = False
        arguments.max_model_len = arguments.max_model_len or max_tokens + 1
        self._llm = LLM.from_engine_args(arguments)

    def run(self, sequences: Chunk) -> None:
        """Run each sequence once; one token is generated, as vLLM asks for."""
        prompts = [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in sequences]
        once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._llm.generate(prompts, once, use_tqdm=False)
