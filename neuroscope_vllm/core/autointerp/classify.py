"""Detection and fuzzing, EleutherAI's two ways to score a label (arXiv 2410.13928). Torch-free.

A judge reads the label and a few texts, and says of each whether the feature fires in it
(detection), or whether the marked tokens are those on which it fires (fuzzing).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from neuroscope_vllm.core.autointerp.judged import Text
from neuroscope_vllm.core.autointerp.prompt import Prompt
from neuroscope_vllm.core.autointerp.questions import Question

DETECTION, FUZZING = "detection", "fuzzing"
KINDS = (DETECTION, FUZZING)
FIELDS = {"label", "texts"}
"""What a prompt asks to be filled in."""
LINE_BREAK = "⏎"


def question(key: str, kind: str, prompt: Prompt, label: str, texts: Sequence[Text]) -> Question:
    """Ask for a judgement of each text."""
    shown = "\n".join(
        f"Text {number}: {written(text, marks=kind == FUZZING)}"
        for number, text in enumerate(texts, start=1)
    )
    return Question(
        key=key,
        system=prompt.system,
        user=prompt.fill(label=label, texts=shown),
        schema=_schema(len(texts)),
        max_tokens=64 + 16 * len(texts),
    )


def written(text: Text, *, marks: bool) -> str:
    """On one line, with << and >> around each run of marked tokens, or without."""
    if not marks:
        shown = "".join(text.tokens)
    else:
        runs = itertools.groupby(zip(text.tokens, text.marked, strict=True), lambda pair: pair[1])
        words = (("".join(token for token, _ in run), marked) for marked, run in runs)
        shown = "".join(f"<<{word}>>" if marked else word for word, marked in words)
    return LINE_BREAK.join(shown.splitlines())


def judgements(content: dict[str, Any], count: int) -> list[int]:
    """1 or 0 for each text, from an answer that fits the schema."""
    return [int(content[_field(number)]) for number in range(1, count + 1)]


def _schema(count: int) -> dict[str, Any]:
    # A field for each text: no answer can have one too few, and every server takes it.
    fields = [_field(number) for number in range(1, count + 1)]
    return {
        "type": "object",
        "properties": {field: {"type": "integer", "enum": [0, 1]} for field in fields},
        "required": fields,
        "additionalProperties": False,
    }


def _field(number: int) -> str:
    return f"text_{number}"
