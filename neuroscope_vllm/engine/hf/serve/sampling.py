"""From what a client asks for to what `model.generate` takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from neuroscope_vllm.engine.hf.serve.ask import Ask

GREEDY_BELOW = 1e-5
"""vLLM's own bound: a lower temperature draws nothing."""


def generation_config(
    ask: Ask, default: GenerationConfig, *, max_tokens: int, eos: list[int]
) -> GenerationConfig:
    """With every value explicit.

    Args:
        default: The model's own, which vLLM falls back on too.
        eos: Tokens that may not come before `ask.min_tokens`.
    """

    def chosen(name: str, neutral: float) -> Any:
        for value in (getattr(ask, name), getattr(default, name, None)):
            if value is not None:
                return value
        return neutral

    temperature = chosen("temperature", 1.0)
    draws = temperature >= GREEDY_BELOW
    sampling: dict[str, Any] = {"do_sample": draws}
    if draws:
        sampling |= {
            "temperature": temperature,
            "top_k": max(chosen("top_k", 0), 0),
            "top_p": chosen("top_p", 1.0),
            "min_p": chosen("min_p", 0.0),
        }
    return GenerationConfig(
        **sampling,
        max_new_tokens=max_tokens,
        min_new_tokens=ask.min_tokens or None,
        repetition_penalty=chosen("repetition_penalty", 1.0),
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
        # Hooks do not fit a compiled forward pass.
        disable_compile=True,
    )


class Penalties(LogitsProcessor):
    """OpenAI's penalties, of what was generated, and its biases."""

    def __init__(self, ask: Ask, prompt_length: int) -> None:
        self._presence, self._frequency = ask.presence_penalty, ask.frequency_penalty
        self._bias = {int(name): value for name, value in (ask.logit_bias or {}).items()}
        self._prompt_length = prompt_length

    @property
    def needed(self) -> bool:
        return bool(self._presence or self._frequency or self._bias)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        for token_id, bias in self._bias.items():
            scores[:, token_id] += bias
        if self._presence or self._frequency:
            said, count = input_ids[0, self._prompt_length :].unique(return_counts=True)
            taken = self._presence + self._frequency * count.to(scores.dtype)
            scores[:, said] -= taken
        return scores


def seed(ask: Ask, choice: int) -> None:
    """Of the draws that follow."""
    if ask.seed in (None, -1):  # -1: none, as in vLLM
        torch.seed()
    else:
        torch.manual_seed(ask.seed + choice)
