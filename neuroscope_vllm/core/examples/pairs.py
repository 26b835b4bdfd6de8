"""How often two features fire on the same token, of those that fire strongest there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STRONGEST = 16
"""Features of a token that are paired."""
MIN_COUNT = 2
"""Pairs that are rarer within a chunk are not counted."""
MAX_PAIRS = 1 << 23
"""Pairs that are kept, of 12 bytes each; beyond, the rarest are dropped."""
PARTNERS = 32
_BLOCK = 1 << 15  # tokens whose pairs are counted at once: 30 MiB
_FIRST, _SECOND = np.triu_indices(STRONGEST, 1)


class Pairs(NamedTuple):
    """Attributes:
    key: int64 [n], ascending: the lower feature times the SAE's width, plus the higher.
    together: int32 [n], on how many tokens both fire.
    """

    key: NDArray[np.int64]
    together: NDArray[np.int32]

    @classmethod
    def empty(cls) -> Pairs:
        return cls(np.empty(0, np.int64), np.empty(0, np.int32))

    def at_least(self, count: int) -> Pairs:
        kept = self.together >= count
        return Pairs(self.key[kept], self.together[kept])


def count_pairs(strongest: NDArray[np.int32], width: int) -> Pairs:
    """Of tokens whose strongest features int32 [n, STRONGEST] are given; -1: none."""
    total = Pairs.empty()
    key_type = np.uint32 if width * width <= 1 << 32 else np.int64  # half the bytes to sort
    for at in range(0, len(strongest), _BLOCK):
        block = np.sort(strongest[at : at + _BLOCK], axis=1)
        low, high = block[:, _FIRST], block[:, _SECOND]
        there = low >= 0
        key = low[there].astype(key_type) * key_type(width) + high[there].astype(key_type)
        key.sort()
        first = np.flatnonzero(np.diff(key, prepend=key[:1] ^ key_type(1)))
        count = np.diff(first, append=len(key))
        total = _sum(total, Pairs(key[first].astype(np.int64), count.astype(np.int32)))
    return total.at_least(MIN_COUNT)


class PairCounts:
    """A running sum over chunks, whose order matters only once there are MAX_PAIRS pairs."""

    def __init__(self) -> None:
        self._total = Pairs.empty()
        self._waiting: list[Pairs] = []

    def add(self, pairs: Pairs) -> None:
        self._waiting.append(pairs)
        if sum(len(some.key) for some in self._waiting) > max(len(self._total.key) // 2, 1 << 16):
            self.total()

    def total(self) -> Pairs:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._total = _pruned(_sum(self._total, *waiting))
        return self._total


def partners(
    pairs: Pairs, width: int, features: range
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of each of some features those it fires with most often.

    Returns:
        (feature, partner, count), by feature, then most often first, then partner; at most PARTNERS
        a feature.
    """
    low, high = np.divmod(pairs.key, width)
    columns = []
    for feature, partner in ((low, high), (high, low)):
        inside = (feature >= features.start) & (feature < features.stop)
        columns.append((feature[inside], partner[inside], pairs.together[inside].astype(np.int64)))
    feature, partner, count = map(np.concatenate, zip(*columns, strict=True))
    order = np.lexsort((partner, -count, feature))
    feature, partner, count = feature[order], partner[order], count[order]
    kept = np.arange(len(feature)) - np.searchsorted(feature, feature) < PARTNERS
    return feature[kept], partner[kept], count[kept]


def _sum(*parts: Pairs) -> Pairs:
    key = np.concatenate([part.key for part in parts])
    order = np.argsort(key, kind="stable")  # of few ascending runs: it merges them
    key = key[order]
    first = np.flatnonzero(np.diff(key, prepend=key[:1] - 1))
    count = np.concatenate([part.together for part in parts])[order]
    if not len(first):
        return Pairs.empty()
    return Pairs(key[first], np.add.reduceat(count, first, dtype=np.int32))


def _pruned(pairs: Pairs) -> Pairs:
    """Half of MAX_PAIRS, if there are more: the most frequent; of equals, the lowest."""
    if len(pairs.key) <= MAX_PAIRS:
        return pairs
    kept = np.sort(np.argsort(-pairs.together, kind="stable")[: MAX_PAIRS // 2])
    return Pairs(pairs.key[kept], pairs.together[kept])
