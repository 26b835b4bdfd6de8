"""The strongest edges between two layers, found block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neuroscope_vllm.core.causal.firings import JointFirings
from neuroscope_vllm.core.causal.pair import MAX_BYTES, Block, Pair, blocks

WEIGHT, ERA, TWERA = "weight", "era", "twera"
BY = (WEIGHT, ERA, TWERA)
INPUTS, OUTPUTS = "inputs", "outputs"


class Edges(NamedTuple):
    """n edges, strongest first; of equals the one of lower features first.

    Attributes:
        lower, upper: int64 [n], features of the earlier and the later layer.
        weight, cosine, era, twera: float32 [n]; see `pair.Block`. NaN where there are no firings.
        together: int32 [n]; -1 likewise.
    """

    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    weight: NDArray[np.float32]
    cosine: NDArray[np.float32]
    era: NDArray[np.float32]
    twera: NDArray[np.float32]
    together: NDArray[np.int32]

    @classmethod
    def joined(cls, parts: Sequence[Edges]) -> Edges:
        """Of no parts, no edges."""
        numbers, values = np.empty(0, np.int64), np.empty(0, np.float32)
        empty = cls(numbers, numbers, values, values, values, values, np.empty(0, np.int32))
        columns: list[Any] = [np.concatenate(column) for column in zip(empty, *parts, strict=True)]
        return cls(*columns)

    def take(self, index: NDArray[np.integer]) -> Edges:
        columns: list[Any] = [column[index] for column in self]
        return Edges(*columns)


def strongest(
    pair: Pair,
    k: int,
    *,
    by: str = WEIGHT,
    of_each: str | None = None,
    firings: JointFirings | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    max_cosine: float | None = None,
    max_bytes: int = MAX_BYTES,
) -> Edges:
    """The k edges of the largest absolute value, of either sign.

    Args:
        by: One of BY; all but WEIGHT need firings. Pairs of zero are no edges.
        of_each: None: k edges in all. INPUTS: k of each of `columns`, by column. OUTPUTS: k of each
            of `rows`, by row.
        firings: Of these two SAEs.
        rows, columns: int64, distinct features of the earlier and the later layer; None: all.
        max_cosine: Leave out pairs whose decoder directions are closer.
        max_bytes: As in `blocks`; what is kept comes on top, 40 bytes an edge.
    """
    group = {None: None, INPUTS: "upper", OUTPUTS: "lower"}[of_each]
    kept = Edges.joined([])
    for block in blocks(pair, firings, rows=rows, columns=columns, max_bytes=max_bytes):
        score = _score(block, by, max_cosine)
        kept = _best(Edges.joined([kept, _candidates(block, score, k, of_each)]), k, by, group)
    return kept


def _score(block: Block, by: str, max_cosine: float | None) -> Tensor:
    """float32 [r, c], at least zero; zero is left out."""
    value = getattr(block, by)
    assert value is not None, f"{by} needs firings"
    score = value.abs()
    if max_cosine is not None:
        score.masked_fill_(block.cosine > max_cosine, 0.0)
    return score


def _candidates(block: Block, score: Tensor, k: int, of_each: str | None) -> Edges:
    """All that may be among the best: those at least as good as a block's k-th."""
    if of_each == INPUTS:
        floor = score.topk(min(k, len(score)), dim=0).values[-1:]
    elif of_each == OUTPUTS:
        floor = score.topk(min(k, score.shape[1]), dim=1).values[:, -1:]
    else:
        floor = score.reshape(-1).topk(min(k, score.numel())).values[-1:]
    # 1-D: see `firings_of`.
    cell = ((score >= floor) & (score > 0)).reshape(-1).nonzero().squeeze(1)
    row, column = cell // score.shape[1], cell % score.shape[1]

    def at(values: Tensor | None) -> NDArray[np.float32]:
        if values is None:
            return np.full(len(cell), np.nan, np.float32)
        return values.reshape(-1)[cell].numpy()

    together = block.together
    return Edges(
        block.rows[row].numpy(),
        block.columns[column].numpy(),
        at(block.weight),
        at(block.cosine),
        at(block.era),
        at(block.twera),
        np.full(len(cell), -1, np.int32)
        if together is None
        else together.reshape(-1)[cell].numpy(),
    )


def _best(edges: Edges, k: int, by: str, group: str | None) -> Edges:
    strength = -np.abs(getattr(edges, by))
    if group is None:
        return edges.take(np.lexsort((edges.upper, edges.lower, strength))[:k])
    order = np.lexsort((edges.upper, edges.lower, strength, getattr(edges, group)))
    grouped = getattr(edges, group)[order]
    rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    return edges.take(order[rank < k])
