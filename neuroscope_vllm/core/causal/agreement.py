"""How well weights rank what ablations do: rank correlations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuroscope_vllm.core.causal.firings import JointFirings
from neuroscope_vllm.core.causal.pair import Pair, blocks
from neuroscope_vllm.core.labels.similarity import spearman

COSINE, COFIRING = "cosine", "co-firing"
"""What weightings have to beat: the decoders' cosine, and E[a_i a_j] / E[a_j] without a weight."""


class Agreement(NamedTuple):
    """Spearman's rank correlation of a weighting with a measured effect.

    Attributes:
        within: Median over ablated features, of each with all of the later layer; None: undefined.
        pooled: Of all pairs together.
        pairs: How many those are.
    """

    within: float | None
    pooled: float | None
    pairs: int


def weightings(pair: Pair, firings: JointFirings | None, features: Tensor) -> dict[str, Tensor]:
    """float32 [r, upper width] of every weighting, of features of the earlier layer int64 [r].

    Unlike `blocks` it holds all of these at once, some 40 bytes a pair.
    """
    parts = list(blocks(pair, firings, rows=features))

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(block, name) for block in parts], dim=1)

    found = {"weight": whole("weight"), COSINE: whole("cosine")}
    if firings is not None:
        product = torch.cat([firings.of_rows(features).sums(b.columns).product for b in parts], 1)
        mean = firings.upper_mean * max(firings.tokens, 1)
        found |= {"era": whole("era"), "twera": whole("twera")}
        found[COFIRING] = (product / torch.where(mean > 0, mean, 1.0)).float()
    return found


def agreements(
    predicted: Mapping[str, Tensor], effect: Tensor, counted: Tensor
) -> dict[str, Agreement]:
    """Of each weighting [r, c] with an effect [r, c], over the pairs that `counted` bool [r, c]
    has."""
    return {name: _agreement(one, effect, counted) for name, one in predicted.items()}


def _agreement(predicted: Tensor, effect: Tensor, counted: Tensor) -> Agreement:
    within = [
        found
        for one, other, mask in zip(predicted, effect, counted, strict=True)
        if (found := spearman(_numbers(one[mask]), _numbers(other[mask]))) is not None
    ]
    pooled = spearman(_numbers(predicted[counted]), _numbers(effect[counted]))
    return Agreement(float(np.median(within)) if within else None, pooled, int(counted.sum()))


def _numbers(values: Tensor) -> NDArray[np.float64]:
    return values.double().numpy()
