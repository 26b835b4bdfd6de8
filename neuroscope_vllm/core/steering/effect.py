"""What steering did to an answer, in figures. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np


class Activity(msgspec.Struct, frozen=True):
    """A feature's activations on some tokens, in the residual's own units."""

    mean: float
    max: float
    tokens: int

    @classmethod
    def of(cls, activations: Sequence[float]) -> Activity | None:
        """None of no tokens."""
        if not activations:
            return None
        return cls(math.fsum(activations) / len(activations), max(activations), len(activations))


def perplexity(logprobs: Sequence[float]) -> float | None:
    """exp of the mean surprise in nats; infinite past what a double holds, None of no tokens."""
    if not logprobs:
        return None
    try:
        return math.exp(-math.fsum(logprobs) / len(logprobs))
    except OverflowError:
        return math.inf


def parting(one: Sequence[object], other: Sequence[object]) -> int | None:
    """Index of the first item that differs, which may be the end of the shorter; None: none."""
    both = min(len(one), len(other))
    differs = (i for i in range(both) if one[i] != other[i])
    return next(differs, None if len(one) == len(other) else both)


def changed(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of tokens that would have to be put in, taken out or replaced to turn one text into the
    other (Levenshtein distance over the longer length): 0 for the same text, 1 for nothing shared.
    """
    longer = max(len(one), len(other))
    if not longer:
        return 0.0
    tokens, steps = np.asarray(other), np.arange(len(other) + 1)
    row = steps
    for token in one:
        kept = np.minimum(row[1:] + 1, row[:-1] + (tokens != token))
        # Putting in tokens one after the other: the running minimum, a step dearer each time.
        row = np.minimum.accumulate(np.append(row[0] + 1, kept) - steps) + steps
    return int(row[-1]) / longer


def distinct(tokens: Sequence[int], n: int = 2) -> float | None:
    """Distinct n-grams over all of them (Li et al. 2016, distinct-n); low where a text repeats
    itself. None where there is none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
