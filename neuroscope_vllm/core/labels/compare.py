"""Two labellers of one SAE, side by side. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from neuroscope_vllm.core.labels.label import Label, LabelSet
from neuroscope_vllm.core.labels.similarity import TextVectors, spearman

SHUFFLES = 10
MEASURES = ("score", "detection", "fuzzing")


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One labeller.

    Attributes:
        labels: How many features have one.
        alone: How many of these the other has none of.
        scored, unreliable, mean_score: As in `Summary`.
    """

    labeller: str
    labels: int
    alone: int
    scored: int
    unreliable: int
    mean_score: float | None


class Wording(msgspec.Struct, frozen=True, kw_only=True):
    """How alike both labellers' texts are, over the features that both have.

    Attributes:
        mean: Mean cosine of a feature's two texts, see `TextVectors`.
        standard_error: Of the mean; None of a single feature.
        shuffled: The same mean with one labeller's texts dealt out anew: what chance gives.
        above_shuffled: How often a feature's own two texts are more alike than one of them and
            another feature's, ties as half: 0.5 by chance.
        identical: Features with the same text but for case.
    """

    mean: float
    standard_error: float | None
    shuffled: float | None
    above_shuffled: float | None
    identical: int


class Paired(msgspec.Struct, frozen=True, kw_only=True):
    """Both labellers' scores, over the features that both have scores of.

    Attributes:
        alike: How many of them were scored by the same method and model; others compare poorly.
        a, b: Means.
        difference: Mean of a - b.
        standard_error: Of the difference; None of a single feature.
        spearman: Rank correlation; None where one does not vary.
        wins_a, wins_b, ties: By feature.
    """

    features: int
    alike: int
    a: float
    b: float
    difference: float
    standard_error: float | None
    spearman: float | None
    wins_a: int
    wins_b: int
    ties: int


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """What both say of one feature. `similarity` is the cosine of the texts."""

    index: int
    text_a: str
    text_b: str
    score_a: float | None
    score_b: float | None
    unreliable_a: bool
    unreliable_b: bool
    similarity: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What `neuroscope labels compare` tells.

    Attributes:
        both: Features that both have labels of.
        wording: None if there is none.
        scores: By measure (score, detection, fuzzing), those that both have.
        pairs: The features in which they differ most: by the gap of their scores, then by their
            texts, least alike first.
    """

    a: Side
    b: Side
    both: int
    wording: Wording | None
    scores: dict[str, Paired]
    pairs: list[Pair]


def compare(a: LabelSet, b: LabelSet, limit: int = 20, seed: int = 0) -> Comparison:
    """
    Args:
        limit: Of `pairs`.
        seed: Of the shuffling.
    """
    found = [(one, other) for one in a if (other := b.get(one.index)) is not None]
    ones, others = [one for one, _ in found], [other for _, other in found]
    n = len(found)
    vectors = TextVectors([label.text for label in (*ones, *others)])
    alike = vectors.cosine(np.arange(n), np.arange(n, 2 * n))
    scores = {name: _paired(ones, others, name) for name in MEASURES}
    return Comparison(
        a=_side(a, n),
        b=_side(b, n),
        both=n,
        wording=_wording(vectors, ones, others, alike, seed) if n else None,
        scores={name: one for name, one in scores.items() if one is not None},
        pairs=_most_different(ones, others, alike)[:limit],
    )


def _side(labels: LabelSet, both: int) -> Side:
    known = labels.summary()
    return Side(
        labeller=labels.labeller,
        labels=known.labels,
        alone=known.labels - both,
        scored=known.scored,
        unreliable=known.unreliable,
        mean_score=known.mean_score,
    )


def _wording(
    vectors: TextVectors,
    ones: Sequence[Label],
    others: Sequence[Label],
    alike: NDArray[np.float64],
    seed: int,
) -> Wording:
    n, draw = len(alike), np.random.default_rng(seed)
    dealt = np.zeros((0, n))
    if n > 1:
        rounds = []
        for _ in range(SHUFFLES):
            order, partner = draw.permutation(n), np.empty(n, dtype=np.int64)
            partner[order] = np.roll(order, 1)  # nobody keeps their own
            rounds.append(vectors.cosine(np.arange(n), n + partner))
        dealt = np.array(rounds)
    above = (alike > dealt) + 0.5 * (alike == dealt)
    return Wording(
        mean=float(alike.mean()),
        standard_error=_standard_error(alike),
        shuffled=float(dealt.mean()) if n > 1 else None,
        above_shuffled=float(above.mean()) if n > 1 else None,
        identical=sum(
            one.text.casefold() == other.text.casefold()
            for one, other in zip(ones, others, strict=True)
        ),
    )


def _paired(ones: Sequence[Label], others: Sequence[Label], name: str) -> Paired | None:
    both = [
        (one, other)
        for one, other in zip(ones, others, strict=True)
        if getattr(one, name) is not None and getattr(other, name) is not None
    ]
    if not both:
        return None
    a, b = (np.array([getattr(pair[side], name) for pair in both], float) for side in (0, 1))
    gap = a - b
    return Paired(
        features=len(both),
        alike=sum(
            (one.scoring, one.scorer) == (other.scoring, other.scorer) for one, other in both
        ),
        a=float(a.mean()),
        b=float(b.mean()),
        difference=float(gap.mean()),
        standard_error=_standard_error(gap),
        spearman=spearman(a, b),
        wins_a=int((gap > 0).sum()),
        wins_b=int((gap < 0).sum()),
        ties=int((gap == 0).sum()),
    )


def _most_different(
    ones: Sequence[Label], others: Sequence[Label], alike: NDArray[np.float64]
) -> list[Pair]:
    pairs = [
        Pair(
            index=one.index,
            text_a=one.text,
            text_b=other.text,
            score_a=one.score,
            score_b=other.score,
            unreliable_a=one.unreliable,
            unreliable_b=other.unreliable,
            similarity=float(cosine),
        )
        for one, other, cosine in zip(ones, others, alike, strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-_gap(pair), pair.similarity, pair.index))


def _gap(pair: Pair) -> float:
    if pair.score_a is None or pair.score_b is None:
        return 0.0
    return round(abs(pair.score_a - pair.score_b), 9)


def _standard_error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
