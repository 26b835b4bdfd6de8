"""Which features of a token are worth showing first.

Two stages. Features that fire on more than `max_frequency` of calibration tokens are masked: they
say nothing about this token. The rest is ordered by a score, one of RANKINGS:

    activation  the activation itself; needs no calibration
    zscore      (a - mean) / max(std, floor), over all calibration tokens
    tail        -ln P(activation >= a): frequency times the tail of the feature's histogram
    quantile    fraction of the feature's firings below a

Used by `sae.encoder` on the hot path: `score` and what it touches are plain tensor arithmetic of
fixed shape, so nothing waits for a GPU.

How a rare feature is kept from always being first. Unfloored, a firing of a feature of frequency p
scores about 1 / sqrt(p), however weak it is for that feature. With firings of mean m, std is about
m * sqrt(p); `zscore` uses it as if p were at least RARE_FREQUENCY, so below that frequency
a feature is ranked by its strength relative to its own firings, at most 10 a / m.
`tail` charges rarity on purpose, in nats: ten times rarer is worth 2.3.

Every feature is given PSEUDO_FIRINGS imaginary firings: of the mean strength of all firings of all
features in its moments, and exponentially distributed with its own mean in its tail. So an unseen
feature has a finite score, and beyond the largest firing seen a stronger one still scores more.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from neuroscope_vllm.core.calibration import Calibration, activation_position, edges
from neuroscope_vllm.core.errors import ConfigError

RankingName = Literal["zscore", "tail", "quantile", "activation"]
RANKINGS: tuple[RankingName, ...] = get_args(RankingName)

RARE_FREQUENCY = 0.01  # below it Neuronpedia calls a feature sparse enough to show
PSEUDO_FIRINGS = 1.0


class Ranker(Protocol):
    """How features of a token are ordered.

    Attributes:
        mask: bool [width]; True = never shown.
        affine: `score` is exactly `dense_scale`'s line, so no other order need be considered.
    """

    mask: Tensor
    affine: bool

    def score(self, index: Tensor, activation: Tensor) -> Tensor:
        """Score f32 [n, m] of features `index` int64 [n, m] active with `activation` f32 [n, m]."""
        ...

    def dense_scale(self) -> tuple[Tensor, Tensor]:
        """(scale > 0, shift), f32 [width]: the line `scale * a + shift` that follows the score.

        The encoder folds it into its selection weights to find candidates among all features. It
        equals `score` when `affine`; otherwise it need only have the best few in its first hundred.
        """
        ...


class AffineRanker:
    """`activation` and `zscore`: one line a feature."""

    affine = True

    def __init__(self, mask: Tensor, scale: Tensor, shift: Tensor) -> None:
        self.mask = mask
        self._scale = scale
        self._shift = shift

    def score(self, index: Tensor, activation: Tensor) -> Tensor:
        return torch.addcmul(self._shift[index], self._scale[index], activation)

    def dense_scale(self) -> tuple[Tensor, Tensor]:
        return self._scale, self._shift


class TailRanker:
    """`tail` and `quantile`: how few of the feature's calibration firings were this strong.

    The score is tabulated at the edges of the histogram's bins and linear in log a between them.
    The line is that of a shifted exponential with the mean and spread of the feature's firings,
    whose `-ln P(>= a)` is affine in a.
    """

    affine = False

    def __init__(
        self, mask: Tensor, calibration: Calibration, *, quantile: bool, device: torch.device
    ) -> None:
        self.mask = mask
        mean, spread, firings = _firing_moments(calibration)
        # In logs, so that an activation far beyond all firings still has a finite, larger score.
        at_least = calibration.histogram.flip(1).cumsum(1).flip(1).double()
        at_least = torch.nn.functional.pad(at_least, (0, 2))
        imagined = math.log(PSEUDO_FIRINGS) - edges().double() / mean[:, None]
        log_at_least = torch.logaddexp(at_least.log(), imagined)
        shift = (spread - mean) / spread
        if quantile:
            table = 1.0 - (log_at_least - firings.log()[:, None]).exp()
        else:
            log_tokens = math.log(calibration.tokens + PSEUDO_FIRINGS)
            table = log_tokens - log_at_least
            shift = shift + log_tokens - firings.log()
        self._stride = table.shape[1]
        self._table = table.float().reshape(-1).to(device)
        self._line = ((1.0 / spread).float().to(device), shift.float().to(device))

    def score(self, index: Tensor, activation: Tensor) -> Tensor:
        position = activation_position(activation)
        cell = position.long().add_(index, alpha=self._stride)
        return torch.lerp(self._table[cell], self._table[cell.add_(1)], position.frac_())

    def dense_scale(self) -> tuple[Tensor, Tensor]:
        return self._line


def make_ranker(
    method: str,
    calibration: Calibration | None = None,
    max_frequency: float = 0.5,
    device: torch.device | str = "cpu",
    *,
    width: int | None = None,
) -> Ranker:
    """Build the ranker of one SAE.

    Args:
        method: One of RANKINGS.
        calibration: Needed by all but `activation`, which uses it only to mask.
        max_frequency: Features that fire on a larger fraction of calibration tokens are masked.
        device: Where the encoder runs.
        width: Number of features; needed when there is no calibration.

    Raises:
        ConfigError: Unknown method, a method without its calibration, a calibration of no
            tokens or of another width, or a frequency outside (0, 1].
    """
    if method not in RANKINGS:
        raise ConfigError(f"ranking {method!r} is unknown; use one of {', '.join(RANKINGS)}.")
    if not 0.0 < max_frequency <= 1.0:
        raise ConfigError(f"max_frequency {max_frequency} is not a fraction; give one in (0, 1].")
    device = torch.device(device)
    if calibration is None:
        return _without_calibration(method, width, device)
    if width not in (None, calibration.width):
        raise ConfigError(
            f"the calibration has {calibration.width} features but the SAE has {width}; "
            f"calibrate this SAE with `neuroscope calibrate`."
        )
    if calibration.tokens == 0:
        raise ConfigError("the calibration saw no tokens; make it with `neuroscope calibrate`.")
    mask = (calibration.frequency > max_frequency).to(device)
    if method in ("tail", "quantile"):
        return TailRanker(mask, calibration, quantile=method == "quantile", device=device)
    scale, shift = torch.ones(calibration.width), torch.zeros(calibration.width)
    if method == "zscore":
        mean, _, _ = _firing_moments(calibration)
        sigma = torch.maximum(calibration.std, math.sqrt(RARE_FREQUENCY) * mean)
        scale, shift = (1.0 / sigma).float(), (-calibration.mean / sigma).float()
    return AffineRanker(mask, scale.to(device), shift.to(device))


def _without_calibration(method: str, width: int | None, device: torch.device) -> Ranker:
    if method != "activation":
        raise ConfigError(
            f"ranking {method!r} needs a calibration; make one with "
            f"`neuroscope calibrate`, or use ranking 'activation'."
        )
    if width is None:
        raise ConfigError("ranking without a calibration needs the SAE's width; give width=.")
    ones = torch.ones(width, device=device)
    return AffineRanker(torch.zeros_like(ones, dtype=torch.bool), ones, torch.zeros_like(ones))


def _firing_moments(calibration: Calibration) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, spread, number) of each feature's firings with the imaginary ones, float64 [width].

    The spread is floored at a quarter of the mean: a handful of equal firings proves nothing.
    """
    typical = calibration.total.sum() / calibration.firings.sum().clamp(min=1)
    typical = torch.where(typical > 0, typical, 1.0)
    number = calibration.firings.double() + PSEUDO_FIRINGS
    mean = (calibration.total + PSEUDO_FIRINGS * typical) / number
    # An exponential of mean m has E[a^2] = 2 m^2.
    square = (calibration.total_square + PSEUDO_FIRINGS * 2.0 * typical.square()) / number
    spread = (square - mean.square()).clamp(min=0.0).sqrt().maximum(0.25 * mean)
    return mean, spread, number
