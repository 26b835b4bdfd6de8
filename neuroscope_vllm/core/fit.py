"""Whether published features are those of a residual: values, membership of the top k, sinks.

The judge knows the SAE, the ranking and an independently computed residual of every position. A
row that does not fit its own residual but that of another position was misattributed; one that
fits none is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.ranking import Ranker
from neuroscope_vllm.core.sae.sae import SAE

TOLERANCE = {"float32": 1e-3, "float16": 0.2, "bfloat16": 0.2}
"""Of a feature's relative error, by the precision the server's model runs in.

Values are exact for the server's own residual, but a bfloat16 model's residual is not that of
float32. On SmolLM2-135M in bfloat16, the worst feature of a row was off by 0.010 (median) to 0.11
(of 15,000 rows) from the row's own float32 residual, and by 0.29 at the very least (median 1.5)
from its neighbour's. 0.2 lies between; so a rounding error is no fault, and rows in the wrong place
do not pass for one.
"""
SCORE_TOLERANCE = 1e-3
"""A score follows from index and activation alone, so no residual's precision excuses it."""
FLOOR = 0.1
"""Errors are relative to an activation, or to this part of the row's largest if that is more: a
ReLU SAE fires arbitrarily weakly."""
CHUNK_CELLS = 1 << 22  # rows x width at a time; each takes some 60 bytes
CHUNK_STRAYS = 32


class Published(NamedTuple):
    """The features of n rows; `valid` tells padding.

    index int64, activation f32, score f32 and valid bool are [n, k]; sink bool and l0 int64 [n].
    """

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.index)
    activation: Tensor
    score: Tensor
    valid: Tensor
    sink: Tensor
    l0: Tensor

    def part(self, rows: slice | Tensor) -> Published:
        return Published(*(column[rows] for column in self))


class Fit(NamedTuple):
    """error f32 [n]: the worst relative error of a row's activations, 2 at most; right bool [n]."""

    error: Tensor
    right: Tensor


def published(events: Sequence[Mapping[str, Any]], top_k: int) -> Published:
    """The features of token events, as tensors of `top_k` columns."""
    n = len(events)
    index = torch.zeros(n, top_k, dtype=torch.int64)
    activation, score = torch.zeros(n, top_k), torch.zeros(n, top_k)
    valid = torch.zeros(n, top_k, dtype=torch.bool)
    for row, event in enumerate(events):
        for column, feature in enumerate(event["top_features"][:top_k]):
            index[row, column] = feature["index"]
            # JSON has no NaN: it comes as null.
            activation[row, column] = _number(feature["activation"])
            score[row, column] = _number(feature["score"])
            valid[row, column] = True
    sink = torch.tensor([bool(event.get("sink")) for event in events], dtype=torch.bool)
    l0 = torch.tensor([event["l0"] for event in events], dtype=torch.int64)
    return Published(index, activation, score, valid, sink, l0)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


class Judge:
    """Judges the rows of one layer."""

    def __init__(
        self,
        sae: SAE,
        ranker: Ranker,
        *,
        top_k: int,
        sink_norm: float | None,
        tolerance: float,
    ) -> None:
        """All as the server has them; `tolerance` of an activation's relative error."""
        self.top_k = top_k
        self._sae = sae
        self._ranker = ranker
        self._sink_norm = float("inf") if sink_norm is None else sink_norm
        self._tolerance = tolerance
        self._rows = sae.W_enc.t().contiguous()
        self._threshold = sae.threshold.float().clamp(min=0.0)

    @torch.inference_mode()
    def fit(self, rows: Published, residuals: Tensor) -> Fit:
        """How rows fit the residuals [n, d_model] of their own positions."""
        step = max(1, CHUNK_CELLS // self._sae.width)
        spans = [slice(at, at + step) for at in range(0, len(rows.sink), step)]
        parts = [self._fit(rows.part(span), residuals[span]) for span in spans]
        return Fit(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.inference_mode()
    def fits_another(self, rows: Published, residuals: Tensor) -> Tensor:
        """bool [n]: whether a row's features are those of any of the residuals [m, d_model]."""
        everything = self._sae.normalised(residuals)
        spans = [slice(at, at + CHUNK_STRAYS) for at in range(0, len(rows.sink), CHUNK_STRAYS)]
        return torch.cat([self._among(rows.part(span), everything) for span in spans])

    def _among(self, rows: Published, everything: Tensor) -> Tensor:
        n, k = rows.index.shape
        index, exists = self._known(rows)
        flat = index.reshape(-1)
        expected = torch.addmm(self._sae.b_enc[flat], everything, self._rows[flat].t())
        expected = expected.view(-1, n, k).where(rows.valid, 0.0)
        errors = _relative(rows.activation.where(rows.valid, 0.0), expected).amax(dim=2)
        return (errors.amin(dim=0) <= self._tolerance) & exists.all(dim=1) & rows.valid.any(dim=1)

    def _known(self, rows: Published) -> tuple[Tensor, Tensor]:
        """(index, exists), both [n, k]; 0 stands for an index that the SAE does not have."""
        exists = (rows.index >= 0) & (rows.index < self._sae.width)
        return torch.where(exists, rows.index, 0), exists

    def _fit(self, rows: Published, residuals: Tensor) -> Fit:
        expected = self._sae.preactivations(residuals)[0]
        index, exists = self._known(rows)
        own = expected.gather(1, index)
        error = _relative(rows.activation.where(rows.valid, 0.0), own.where(rows.valid, 0.0))
        error = error.where(exists, 2.0).amax(dim=1)

        strength = rows.activation.where(rows.valid, 0.0).amax(dim=1, keepdim=True)
        slack = self._tolerance * expected.abs().maximum(FLOOR * strength)
        least, most = expected - slack, expected + slack
        enough, sure = self._places(least, most)
        right = (error <= self._tolerance) & self._consistent(rows, index, enough)
        right &= self._complete(rows, index, least, sure)
        # As many features are active as may be, with those near their thresholds in or out.
        fewest, highest = ((x > self._threshold).sum(dim=1) for x in (least, most))
        k = self._sae.info.k or self._sae.width
        right &= (fewest.clamp(max=k) <= rows.l0) & (rows.l0 <= highest.clamp(max=k))
        return self._with_sinks(rows, residuals, Fit(error, right))

    def _places(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        """(enough, sure), [n, 1]: at `enough` a feature may be among the k largest of its row, and
        at more than `sure` it must be, with every one between `least` and `most` [n, width]."""
        k = self._sae.info.k
        n, width = least.shape
        anything = least.new_full((n, 1), float("-inf"))
        if k is None:
            return anything, anything
        enough = least.topk(k, dim=1).values[:, -1:]
        return enough, anything if k == width else most.topk(k + 1, dim=1).values[:, -1:]

    def _consistent(self, rows: Published, index: Tensor, enough: Tensor) -> Tensor:
        """bool [n]: active features, none masked or twice, with their own scores in order."""
        active = (rows.activation > self._threshold[index]) & (rows.activation >= enough)
        active &= ~self._ranker.mask[index]
        score = self._ranker.score(index, rows.activation)
        same = (rows.score - score).abs() <= SCORE_TOLERANCE * score.abs().clamp(min=1.0)
        ordered = rows.score.where(rows.valid, float("-inf"))
        falling = (ordered[:, 1:] <= ordered[:, :-1]).all(dim=1)
        marks = torch.where(rows.valid, index, -1 - torch.arange(index.shape[1]))
        marks = marks.sort(dim=1).values
        distinct = (marks[:, 1:] != marks[:, :-1]).all(dim=1)
        return (active & same | ~rows.valid).all(dim=1) & falling & distinct

    def _complete(self, rows: Published, index: Tensor, least: Tensor, sure: Tensor) -> Tensor:
        """bool [n]: no feature was left out that scores higher than the last one reported even at
        `least` [n, width], the weakest activation within tolerance."""
        n, width = least.shape
        every = torch.arange(width).expand(n, width)
        score = self._ranker.score(every, least)
        absent = (least > self._threshold) & (least > sure) & ~self._ranker.mask
        # Padding writes to a column of its own.
        absent = torch.nn.functional.pad(absent, (0, 1))
        absent = absent.scatter(1, torch.where(rows.valid, index, width), False)[:, :width]
        lowest = rows.score.where(rows.valid, float("-inf")).amin(dim=1, keepdim=True)
        lowest = lowest + SCORE_TOLERANCE * lowest.abs().clamp(min=1.0).nan_to_num(posinf=0.0)
        return ~(absent & (score > lowest)).any(dim=1)

    def _with_sinks(self, rows: Published, residuals: Tensor, fit: Fit) -> Fit:
        """Sinks have no features; either answer will do within the tolerance of the cut."""
        norm = torch.linalg.vector_norm(residuals, dim=1)
        slack = self._tolerance * norm
        allowed = torch.where(
            rows.sink, norm + slack > self._sink_norm, norm - slack <= self._sink_norm
        )
        right = allowed & torch.where(rows.sink, ~rows.valid.any(dim=1), fit.right)
        return Fit(torch.where(rows.sink, 0.0, fit.error), right)


def _relative(activation: Tensor, expected: Tensor) -> Tensor:
    """|a - e| over the larger of both, or FLOOR of the row's largest activation; at most 2, which
    is also what NaN gives."""
    floor = FLOOR * activation.abs().amax(dim=-1, keepdim=True)
    size = activation.abs().maximum(expected.abs()).maximum(floor)
    error = (activation - expected).abs() / size.clamp(min=torch.finfo(size.dtype).tiny)
    return error.nan_to_num(nan=2.0, posinf=2.0)
