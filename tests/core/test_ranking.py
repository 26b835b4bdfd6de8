"""Scores against their definitions, feature by feature."""

from __future__ import annotations

import math

import pytest
import torch

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.ranking import RANKINGS, make_ranker
from neuroscope_vllm.core.sae.sparse import firings_of

TOKENS = 100_000
ALWAYS, COMMON, RARE, ONCE, NEVER = range(5)
FREQUENCIES = (0.8, 0.05, 0.001, 1 / TOKENS, 0.0)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Five features whose firings are 4 plus an exponential of mean 8."""
    draw = torch.Generator().manual_seed(0)
    f = torch.zeros(TOKENS, len(FREQUENCIES))
    for feature, frequency in enumerate(FREQUENCIES):
        firings = round(frequency * TOKENS)
        f[:firings, feature] = torch.empty(firings).exponential_(1 / 8, generator=draw) + 4
    measured = Calibration.empty(len(FREQUENCIES))
    measured.update(len(f), firings_of(f))
    return measured


def score(calibration: Calibration, method: str, feature: int, activation: float) -> float:
    ranker = make_ranker(method, calibration)
    return float(ranker.score(torch.tensor([[feature]]), torch.tensor([[activation]])))


def test_features_above_the_frequency_are_masked(calibration: Calibration) -> None:
    assert make_ranker("tail", calibration).mask.tolist() == [True] + [False] * 4
    assert make_ranker("zscore", calibration, 0.01).mask.tolist() == [True, True] + [False] * 3
    assert not make_ranker("activation", calibration, 1.0).mask.any()
    assert not make_ranker("activation", width=7).mask.any()


def test_activation_is_the_activation(calibration: Calibration) -> None:
    ranker = make_ranker("activation", calibration)
    index, activation = torch.tensor([[1, 2, 4]]), torch.tensor([[3.0, 0.5, 7.25]])
    torch.testing.assert_close(ranker.score(index, activation), activation)


def test_zscore_is_the_deviation_in_sigmas(calibration: Calibration) -> None:
    mean, std = float(calibration.mean[COMMON]), float(calibration.std[COMMON])
    assert score(calibration, "zscore", COMMON, 20.0) == pytest.approx((20 - mean) / std, rel=1e-5)


def test_zscore_does_not_put_a_rare_feature_first_for_being_rare(calibration: Calibration) -> None:
    unfloored = 4.5 / float(calibration.std[RARE])
    assert unfloored > 8  # a firing that is weak for this feature
    weak, strong = (score(calibration, "zscore", RARE, a) for a in (4.5, 40.0))
    assert weak < score(calibration, "zscore", COMMON, 20.0) < strong
    assert score(calibration, "zscore", ONCE, 12.0) == pytest.approx(10.0, rel=0.1)
    assert math.isfinite(score(calibration, "zscore", NEVER, 12.0))


@pytest.mark.parametrize("feature", [COMMON, RARE])
@pytest.mark.parametrize("activation", [5.0, 12.0, 20.0])
def test_tail_is_minus_the_log_probability(
    calibration: Calibration, feature: int, activation: float
) -> None:
    probability = FREQUENCIES[feature] * math.exp(-(activation - 4) / 8)
    ours = score(calibration, "tail", feature, activation)
    assert ours == pytest.approx(-math.log(probability), abs=0.25)


@pytest.mark.parametrize("activation", [5.0, 12.0, 20.0, 40.0])
def test_quantile_is_the_fraction_of_firings_below(
    calibration: Calibration, activation: float
) -> None:
    below = 1 - math.exp(-(activation - 4) / 8)
    assert score(calibration, "quantile", COMMON, activation) == pytest.approx(below, abs=0.02)


@pytest.mark.parametrize("method", RANKINGS)
@pytest.mark.parametrize("feature", range(5))
def test_a_stronger_activation_never_scores_less(
    calibration: Calibration, method: str, feature: int
) -> None:
    activation = torch.exp2(torch.linspace(-6, 12, 400))[None]
    index = torch.full_like(activation, feature, dtype=torch.int64)
    scores = make_ranker(method, calibration).score(index, activation)
    assert scores.isfinite().all()
    assert (scores.diff() >= -1e-5).all()


def test_beyond_all_firings_a_stronger_one_still_scores_more(calibration: Calibration) -> None:
    largest = float(calibration.maximum[COMMON])
    tails = [score(calibration, "tail", COMMON, largest * times) for times in (1.5, 2, 4, 8)]
    assert tails == sorted(set(tails))


def test_the_rarer_the_more_surprising(calibration: Calibration) -> None:
    tails = [score(calibration, "tail", feature, 5.0) for feature in range(5)]
    assert tails == sorted(tails)
    assert tails[NEVER] == pytest.approx(math.log(TOKENS) + 5 / 12, abs=0.1)


@pytest.mark.parametrize("method", RANKINGS)
def test_the_line_is_the_score_or_follows_it(calibration: Calibration, method: str) -> None:
    ranker = make_ranker(method, calibration)
    scale, shift = ranker.dense_scale()
    assert (scale > 0).all()
    activation = torch.linspace(5, 40, 50)[None].expand(5, -1)
    line = shift[:, None] + scale[:, None] * activation
    scores = ranker.score(torch.arange(5)[:, None].expand(5, 50), activation)
    if ranker.affine:
        torch.testing.assert_close(line, scores)
    if method == "tail":
        assert (line - scores)[COMMON].abs().max() < 0.5


@pytest.mark.parametrize("method", RANKINGS)
def test_no_number_breaks_a_score(calibration: Calibration, method: str) -> None:
    strange = torch.tensor([[0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e30, 1e-30]])
    make_ranker(method, calibration).score(torch.full((1, 7), 4), strange)


@pytest.mark.parametrize("method", ["zscore", "tail", "quantile"])
def test_what_needs_a_calibration_says_so(method: str) -> None:
    with pytest.raises(ConfigError, match=f"ranking '{method}' needs a calibration; make one with"):
        make_ranker(method, None, width=4)


def test_what_cannot_be_ranked_is_refused(calibration: Calibration) -> None:
    with pytest.raises(ConfigError, match="ranking 'best' is unknown; use one of zscore, tail"):
        make_ranker("best", calibration)
    for frequency in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=f"max_frequency {frequency} is not a fraction"):
            make_ranker("tail", calibration, frequency)
    with pytest.raises(ConfigError, match="needs the SAE's width; give width="):
        make_ranker("activation")
    with pytest.raises(ConfigError, match="calibration has 5 features but the SAE has 6"):
        make_ranker("tail", calibration, width=6)
    with pytest.raises(ConfigError, match="the calibration saw no tokens"):
        make_ranker("tail", Calibration.empty(5))
