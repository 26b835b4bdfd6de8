"""Every answer of a judge, kept so that scores can be computed again, by anyone. Torch-free.

    <home>/scores/<labeller>.jsonl      a line a question

With pandas, the columns that eai-delphi computes with:

    lines = pandas.read_json(path, lines=True).explode(["texts", "hard", "truth", "answer"])
    lines = lines.rename(columns={"truth": "activating", "answer": "prediction"})
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.errors import ConfigError


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """One answered question.

    Attributes:
        feature: Whose label was scored.
        kind: `detection` or `fuzzing`.
        part: Which of the feature's questions of this kind, from 0.
        label: Its text.
        method: As in `Label.scoring`.
        judge: The model that was asked for.
        model: The model that answered, as the server names it.
        texts: Their ids, see `judged.Text`.
        hard: 1 where a neighbour of the feature fires, and it does not.
        truth: 1 where the feature fires.
        answer: 1 where the judge says so.
    """

    feature: int
    kind: str
    part: int
    label: str
    method: str
    judge: str
    model: str | None = None
    texts: list[str]
    hard: list[int]
    truth: list[int]
    answer: list[int]


Known = dict[tuple[int, str, int], Judgement]
"""By feature, kind and part."""


def read_judgements(path: Path) -> Known:
    """What is kept. Of several for the same question the last counts; a cut-off last line does not.

    Raises:
        ConfigError: A line is something else.
    """
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    found: Known = {}
    for number, line in enumerate(lines, start=1):
        try:
            one = msgspec.json.decode(line, type=Judgement) if line else None
        except msgspec.DecodeError as error:
            if number == len(lines):
                break
            raise ConfigError(
                f"line {number} of {path} is no judgement ({error}); move the file away to score "
                f"afresh."
            ) from error
        if one is not None:
            found[one.feature, one.kind, one.part] = one
    return found


def forget(path: Path, is_stale: Callable[[Judgement], bool]) -> Known:
    """Take out what no score rests on any more, and return what is left."""
    known = read_judgements(path)
    kept = {key: one for key, one in known.items() if not is_stale(one)}
    if len(kept) < len(known):
        artefacts.write_whole(path, b"".join(msgspec.json.encode(k) + b"\n" for k in kept.values()))
    return kept
