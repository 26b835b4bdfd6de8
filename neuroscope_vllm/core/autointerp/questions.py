"""What is asked of a language model, and what it answered. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One chat request whose answer is a JSON object.

    Attributes:
        key: Names the question within a run; `custom_id` in a batch file.
        system, user: The messages.
        schema: JSON schema of the answer.
        max_tokens: Of the answer.
    """

    key: str
    system: str
    user: str
    schema: dict[str, Any]
    max_tokens: int = 512


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a question.

    Attributes:
        key: The question's.
        content: The JSON object, which fits the schema; None where there was none.
        failure: Why there is none, as a sentence.
        prompt_tokens, completion_tokens: As the server counted them, over all attempts.
        cost: In US dollars, over all attempts; None if the price is not known.
        model: As the server names what answered.
    """

    key: str
    content: dict[str, Any] | None
    failure: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    model: str | None = None


def with_room(questions: Iterable[Question], thought_tokens: int) -> Iterator[Question]:
    """The same questions for a model that thinks before it answers, within `max_tokens`."""
    return (
        msgspec.structs.replace(question, max_tokens=question.max_tokens + thought_tokens)
        for question in questions
    )
