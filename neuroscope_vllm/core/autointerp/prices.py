"""What questions cost: prices of tokens, how many a question has, and at most. Torch-free."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from neuroscope_vllm.core.autointerp.questions import Question

CHARS_PER_TOKEN = 3.4
"""Of questions for a label, about the demo's features and in its tokens; those for a score, whose
texts bear fewer marks, have 3.8."""
ADDED_TOKENS = 600
"""What servers put around a question: a chat template, or the instructions for a schema."""


class Price(msgspec.Struct, frozen=True):
    """US dollars for a token.

    Attributes:
        prompt, completion: Of the question and of the answer.
        request: For each request besides.
    """

    prompt: float
    completion: float
    request: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return self.prompt * prompt_tokens + self.completion * completion_tokens + self.request


def prompt_tokens(question: Question) -> int:
    """An estimate of the tokens of a question."""
    return math.ceil((len(question.system) + len(question.user)) / CHARS_PER_TOKEN) + 20


def worst_case(question: Question, price: Price) -> float:
    """US dollars that one request can not cost more than: no token is shorter than a byte."""
    written = question.system, question.user, msgspec.json.encode(question.schema).decode()
    most = sum(len(text.encode(errors="replace")) for text in written) + ADDED_TOKENS
    return price.of(most, question.max_tokens)


def listed_price(model: dict[str, Any]) -> Price | None:
    """The price in one entry of a server's list of models, as OpenRouter writes it."""
    pricing = model.get("pricing")
    if not isinstance(pricing, dict):
        return None
    try:
        prompt, completion = float(pricing["prompt"]), float(pricing["completion"])
        found = Price(prompt, completion, float(pricing.get("request") or 0))
    except (KeyError, TypeError, ValueError):
        return None
    # A router that can not tell the price before it chooses a model writes -1.
    return found if min(found.prompt, found.completion, found.request) >= 0 else None
