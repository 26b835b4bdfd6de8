"""Which position of one prompt corresponds to which of the other. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.patching.record import Column, Prompt

AROUND = 3
"""Tokens shown on either side of where prompts differ."""


def aligned(into: Sequence[int], source: Sequence[int]) -> list[Column]:
    """A column for each token of `into`, in order.

    Prompts of one length correspond position by position. Otherwise positions are matched one to
    one, in order, where the tokens are the same, or stand in stretches of one length between such;
    the others have no source.
    """
    if len(into) == len(source):
        return [Column(position=at, source=at) for at in range(len(into))]
    matched: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(None, into, source, autojunk=False)
    for _, start, stop, source_start, source_stop in matcher.get_opcodes():
        if stop - start == source_stop - source_start:
            matched |= zip(range(start, stop), range(source_start, source_stop), strict=True)
    return [Column(position=at, source=matched.get(at)) for at in range(len(into))]


def check_aligned(clean: Prompt, corrupted: Prompt) -> None:
    """Raises ConfigError, which shows both, unless they have the same number of tokens."""
    if len(clean.token_ids) == len(corrupted.token_ids):
        return
    columns = aligned(corrupted.token_ids, clean.token_ids)
    matched = sum(column.source is not None for column in columns)
    raise ConfigError(
        f"the clean prompt has {len(clean.token_ids)} tokens ({_difference(clean, corrupted)}) and"
        f" the corrupted one {len(corrupted.token_ids)} ({_difference(corrupted, clean)}), so their"
        " positions do not correspond; reword one of them, or give --align, which patches the"
        f" {matched} positions that can be matched."
    )


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens from the first on are the same."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def choose(
    columns: Sequence[Column], positions: Collection[int] | None, start: int
) -> list[Column]:
    """Those to patch: at `positions`, or if that is None from `start` on.

    Before the first token that differs, both runs are the same, and replacing changes nothing.

    Raises:
        ConfigError: There is no such position, or none of them can be patched.
    """
    last = len(columns) - 1
    if positions and (wrong := [at for at in positions if at > last]):
        raise ConfigError(
            f"position {wrong[0]} does not exist; the prompt that is patched has {len(columns)}"
            f" tokens, numbered 0 to {last}."
        )
    wanted = range(start, len(columns)) if positions is None else positions
    found = [column for column in columns if column.position in wanted]
    if all(column.source is None for column in found):
        raise ConfigError(
            "none of the positions to patch corresponds to one of the other prompt; choose others"
            " with --positions, or reword a prompt."
        )
    return found


def _difference(one: Prompt, other: Prompt) -> str:
    """The tokens of `one`, without most of those that both begin and end with."""
    ids, others = one.token_ids, other.token_ids
    start = common_start(ids, others)
    end = common_start(ids[start:][::-1], others[start:][::-1])
    first, last = max(start - AROUND, 0), min(len(ids) - end + AROUND, len(ids))
    shown = [repr(token) for token in one.tokens[first:last]]
    return " ".join(["…"] * (first > 0) + shown + ["…"] * (last < len(ids)))
