"""What features of two layers did on the same tokens: all that fired, token by token.

Everything that fires is kept, at 8 bytes a firing, so sums over pairs of features are exact for any
pair that is asked for, and width x width is never held. Tokens that were left out (special ones and
attention sinks, of either layer) count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuroscope_vllm.core.examples.choice import ranges

JOINED = 1 << 20
"""Pairs of firings that are summed at a time: about 40 MiB."""


class LayerFirings(NamedTuple):
    """What fired in one layer on n tokens.

    Attributes:
        start: int64 [n + 1], where each token's begin.
        feature: int32 [m].
        activation: float32 [m], above zero.
    """

    start: Tensor
    feature: Tensor
    activation: Tensor

    @property
    def token(self) -> Tensor:
        """int64 [m]."""
        count = self.start.diff()
        return torch.arange(len(count)).repeat_interleave(count)


class Sums(NamedTuple):
    """Over all tokens, of r features of the earlier layer by c of the later.

    Attributes:
        product: float64 [r, c], sum of a_i a_j.
        masked: float64 [r, c], sum of a_i where a_j > 0.
        together: int32 [r, c], tokens on which both fire.
    """

    product: Tensor
    masked: Tensor
    together: Tensor


@dataclass(frozen=True, eq=False)
class JointFirings:
    """
    Attributes:
        lower, upper: What fired in the earlier and in the later layer, on the same tokens.
        lower_width, upper_width: Features of the two SAEs.
    """

    lower: LayerFirings
    upper: LayerFirings
    lower_width: int
    upper_width: int

    @property
    def tokens(self) -> int:
        return len(self.lower.start) - 1

    @cached_property
    def lower_mean(self) -> Tensor:
        """float64 [lower_width], E[a_i] over all tokens."""
        return _mean(self.lower, self.lower_width)

    @cached_property
    def upper_mean(self) -> Tensor:
        """float64 [upper_width], E[a_j]."""
        return _mean(self.upper, self.upper_width)

    @cached_property
    def lower_count(self) -> Tensor:
        """int64 [lower_width], tokens that each feature fires on."""
        return torch.bincount(self.lower.feature, minlength=self.lower_width)

    @cached_property
    def upper_count(self) -> Tensor:
        """int64 [upper_width]."""
        return torch.bincount(self.upper.feature, minlength=self.upper_width)

    @cached_property
    def _upper_by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """(start int64 [upper_width + 1], token int64 [m], activation float32 [m])."""
        order = self.upper.feature.sort(stable=True).indices
        start = torch.nn.functional.pad(self.upper_count.cumsum(0), (1, 0))
        return start, self.upper.token[order], self.upper.activation[order]

    def of_rows(self, rows: Tensor) -> JointFirings:
        """The same, of some features of the earlier layer alone, int64 [r], numbered as in it."""
        if torch.equal(rows, torch.arange(self.lower_width)):
            return self
        number = torch.full((self.lower_width,), -1, dtype=torch.int32)
        number[rows] = torch.arange(len(rows), dtype=torch.int32)
        feature = number[self.lower.feature]
        kept = feature >= 0
        before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
        lower = LayerFirings(before[self.lower.start], feature[kept], self.lower.activation[kept])
        found = JointFirings(lower, self.upper, len(rows), self.upper_width)
        found.__dict__["_upper_by_feature"] = self._upper_by_feature
        found.__dict__["upper_mean"] = self.upper_mean
        return found

    def sums(self, columns: Tensor) -> Sums:
        """Of all features of the earlier layer by some of the later, int64 [c]."""
        start, token, activation = (column.numpy() for column in self._upper_by_feature)
        first, feature, a_i = (column.numpy() for column in self.lower)
        size, width = np.diff(first), self.lower_width
        product = np.zeros((len(columns), width))
        masked = np.zeros((len(columns), width))
        together = np.zeros((len(columns), width), np.int32)
        # One of the later layer at a time: what is added to then stays in the processor's cache.
        for at, column in enumerate(columns.tolist()):
            own = slice(start[column], start[column + 1])
            tokens, a_j = token[own], activation[own].astype(np.float64)
            for part in _pieces(size[tokens]):
                each = size[tokens[part]]
                joined = ranges(first[tokens[part]], each)
                fired, strength = feature[joined], a_i[joined].astype(np.float64)
                masked[at] += np.bincount(fired, strength, width)
                together[at] += np.bincount(fired, minlength=width)
                strength *= np.repeat(a_j[part], each)
                product[at] += np.bincount(fired, strength, width)
        found = (torch.from_numpy(sums).t().contiguous() for sums in (product, masked, together))
        return Sums(*found)


def _mean(firings: LayerFirings, width: int) -> Tensor:
    total = torch.bincount(firings.feature, firings.activation.double(), minlength=width)
    return total.double() / max(len(firings.start) - 1, 1)


def _pieces(sizes: NDArray[np.int64]) -> list[slice]:
    """Runs of about JOINED in all; one is always whole."""
    ends = np.cumsum(sizes)
    if not len(ends) or ends[-1] <= JOINED:
        return [slice(0, len(sizes))] if len(sizes) else []
    cuts = np.searchsorted(ends, np.arange(JOINED, ends[-1], JOINED), side="right")
    bounds = np.unique([0, *cuts, len(sizes)]).tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]
