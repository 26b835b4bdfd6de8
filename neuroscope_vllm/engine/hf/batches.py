"""Sequences that run together. What fills up the shorter ones comes after them, where causal
attention never looks from before, so no mask is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from neuroscope_vllm.engine.protocol import Chunk

BATCH_TOKENS = 2048
"""Tokens that run at once, those that fill up shorter sequences included."""


def fitting(order: Sequence[int], sequences: Chunk) -> list[int]:
    """The first ones of `order` that run together, at least one."""
    found: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, len(sequences[i]))
        if found and longest * (len(found) + 1) > BATCH_TOKENS:
            break
        found.append(i)
    return found


def batches(sequences: Chunk) -> Iterator[tuple[int, Chunk]]:
    """In their order: the number of the first, and those that run with it."""
    start = 0
    while start < len(sequences):
        stop = start + len(fitting(range(start, len(sequences)), sequences))
        yield start, sequences[start:stop]
        start = stop


def padded(sequences: Chunk) -> tuple[Tensor, Tensor]:
    """(token ids int64 [n, longest], where they are tokens of a sequence: bool, alike)."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in sequences])
    length = torch.tensor([len(one) for one in sequences])
    return ids, torch.arange(longest) < length[:, None]
