"""Which tokens are kept of a feature: its strongest, and a uniform sample.

The choice depends on the tokens alone, so parts of a corpus may be chosen from first, in any order
and any number of times, and what is chosen from all that was kept is what would have been chosen
from the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PLACE_BITS = 32
"""`place` is sequence << PLACE_BITS | position."""


class Table(NamedTuple):
    """n tokens on which features fire, and with each a list of what is around it, of m in all.

    Attributes:
        ident: uint64 [n], feature and context (`hashes.idents`).
        place: int64 [n].
        activation: float32 [n].
        size: int32 [n], lengths of the lists in the two below.
        item: int32 [m].
        value: float32 [m].
    """

    ident: NDArray[np.uint64]
    place: NDArray[np.int64]
    activation: NDArray[np.float32]
    size: NDArray[np.int32]
    item: NDArray[np.int32]
    value: NDArray[np.float32]

    @classmethod
    def empty(cls) -> Table:
        return cls(
            np.empty(0, np.uint64),
            np.empty(0, np.int64),
            np.empty(0, np.float32),
            np.empty(0, np.int32),
            np.empty(0, np.int32),
            np.empty(0, np.float32),
        )

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        return cls(*map(np.concatenate, zip(*tables, strict=True)))

    def take(self, rows: NDArray[np.integer]) -> Table:
        starts = np.cumsum(self.size) - self.size
        inside = ranges(starts[rows], self.size[rows])
        return Table(
            self.ident[rows],
            self.place[rows],
            self.activation[rows],
            self.size[rows],
            self.item[inside],
            self.value[inside],
        )


class Choice(NamedTuple):
    """Indices of what is kept.

    Attributes:
        top: Of the strongest, by feature, then strength.
        sample: Of the sample, by feature, then at random.
    """

    top: NDArray[np.intp]
    sample: NDArray[np.intp]

    @property
    def either(self) -> NDArray[np.intp]:
        """Ascending."""
        either = np.concatenate(self)
        kept = np.zeros(either.max(initial=-1) + 1, bool)
        kept[either] = True
        return np.flatnonzero(kept)


def order(ident: NDArray[np.uint64], place: NDArray[np.int64]) -> NDArray[np.intp]:
    """Indices that sort by ident, then place."""
    found = np.argsort(ident, kind="stable")
    ident, place = ident[found], place[found]
    if np.any((ident[1:] == ident[:-1]) & (place[1:] < place[:-1])):  # else they came in order
        found = found[np.lexsort((place, ident))]
    return found


def choose(
    ident: NDArray[np.uint64],
    place: NDArray[np.int64],
    activation: NDArray[np.float32],
    bits: int,
    top: int,
    sample: int,
    floor: NDArray[np.float32],
) -> Choice:
    """Choose from tokens [n], in `order`.

    The strongest are those of the largest activation, of equal ones the earliest; of those with one
    context only the best counts. Of contexts the sample is random, and has the first token of each.

    Args:
        bits: Upper bits of ident, which are the feature.
        top, sample: How many a feature.
        floor: float32 [features], activations below which a token is not among the strongest.
    """
    feature = ident >> np.uint64(64 - bits)
    first = _changes(ident)
    context = np.cumsum(first)
    sampled = np.flatnonzero(first)
    sampled = sampled[_rank(feature[sampled]) < sample]

    strong = np.flatnonzero(activation >= floor[feature])
    reverse = (~activation[strong].view(np.uint32)).astype(np.uint64)  # orders as -activation
    strength = (feature[strong] << np.uint64(32)) | reverse
    best = strong[np.lexsort((place[strong], strength))]
    best = best[np.sort(np.unique(context[best], return_index=True)[1])]
    return Choice(best[_rank(feature[best]) < top], sampled)


def ranges(starts: NDArray[np.integer], sizes: NDArray[np.integer]) -> NDArray[np.intp]:
    """start, start + 1, ... of each of many ranges, one after another."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - sizes), sizes)


def _changes(column: NDArray[np.unsignedinteger]) -> NDArray[np.bool_]:
    """Which of a sorted column are the first of their value."""
    return np.concatenate([np.ones(min(len(column), 1), bool), column[1:] != column[:-1]])


def _rank(column: NDArray[np.unsignedinteger]) -> NDArray[np.intp]:
    """Of each of a sorted column among those of its value, from 0."""
    index = np.arange(len(column))
    return index - np.maximum.accumulate(np.where(_changes(column), index, 0))
