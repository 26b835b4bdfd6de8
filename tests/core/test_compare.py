"""Two labellers compared, against scikit-learn, scipy and what was put in."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.labels.compare import compare
from neuroscope_vllm.core.labels.similarity import TextVectors, _terms, spearman

TEXTS = [
    "references to dogs and other pets",
    "dog breeds",
    "the word “the”",
    "Größe, naïve CAFÉ",
    "años y años",
    "42",
    "!?",
    "",
]


def labels(name: str, texts: dict[int, str], scores: dict[int, float] | None = None) -> LabelSet:
    scores = scores or {}
    return LabelSet(name, (Label(i, text, name, scores.get(i)) for i, text in texts.items()))


def test_cosines_are_scikit_learns() -> None:
    found = TfidfVectorizer(analyzer=lambda text: list(_terms(text))).fit_transform(TEXTS)
    expected = (found @ found.T).toarray()
    n = len(TEXTS)
    ones, others = (grid.ravel() for grid in np.meshgrid(range(n), range(n), indexing="ij"))
    ours = TextVectors(TEXTS).cosine(ones, others)
    np.testing.assert_allclose(ours.reshape(n, n), expected, atol=1e-12)


def test_the_same_words_are_alike_and_others_are_not() -> None:
    texts = ["The old man", "man, old: THE", "cities", "city", "puppies", "bridges", "“;”", "“;”"]
    alike = TextVectors(texts).cosine(np.array([0, 2, 4, 6]), np.array([1, 3, 5, 7]))
    assert alike[[0, 3]].min() > 0.999
    assert 0.1 < alike[1] < 0.9
    assert alike[2] < 0.2
    assert TextVectors([]).cosine(np.array([], int), np.array([], int)).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert spearman(a, b) is None
    else:
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)


def test_coverage_scores_and_where_they_differ() -> None:
    a = labels("a", {1: "dogs", 2: "cats", 3: "Rome", 4: "x"}, {1: 0.9, 2: 0.8, 3: 0.5})
    b = labels("b", {1: "dogs", 2: "boats", 3: "rome", 9: "y"}, {1: 0.9, 2: 0.55, 3: 0.6, 9: 1.0})
    found = compare(a, b)
    assert (found.both, found.a.alone, found.b.alone) == (3, 1, 1)
    assert (found.a.unreliable, found.b.unreliable) == (1, 1)
    assert (found.a.scored, found.b.scored, found.a.labels) == (3, 4, 4)
    assert found.wording is not None
    assert found.wording.identical == 2
    assert list(found.scores) == ["score"]
    paired = found.scores["score"]
    gaps = [0.0, 0.25, -0.1]
    assert (paired.wins_a, paired.wins_b, paired.ties) == (1, 1, 1)
    assert (paired.features, paired.alike) == (3, 3)
    assert paired.difference == pytest.approx(np.mean(gaps)) == pytest.approx(paired.a - paired.b)
    assert paired.standard_error == pytest.approx(scipy.stats.sem(gaps))
    assert [(pair.index, pair.unreliable_b) for pair in found.pairs] == [
        *((2, True), (3, False), (1, False)),
    ]
    assert len(compare(a, b, limit=1).pairs) == 1


def test_without_scores_the_least_alike_come_first() -> None:
    a = labels("a", {0: "dogs", 1: "big red boats", 2: "cities"})
    b = labels("b", {0: "dogs", 1: "numbers", 2: "city"})
    found = compare(a, b)
    assert [pair.index for pair in found.pairs] == [1, 2, 0]
    assert found.scores == {}


def test_scores_by_other_methods_are_counted() -> None:
    one = Label(0, "x", "a", 0.9, detection=0.9, scoring="detection@1:2", scorer="m")
    two = Label(0, "x", "b", 0.9, detection=0.9, scoring="detection@1:2", scorer="other")
    found = compare(LabelSet("a", [one]), LabelSet("b", [two]))
    assert {name: one.alike for name, one in found.scores.items()} == {"score": 0, "detection": 0}
    assert found.wording is not None
    assert (found.wording.shuffled, found.wording.standard_error) == (None, None)


def test_wording_is_held_against_chance() -> None:
    draw = np.random.default_rng(0)
    words = [f"word{draw.integers(1e6)}" for _ in range(300)]
    texts = {i: " ".join(draw.choice(words, 3)) for i in range(200)}
    same = {i: f"{text} or so" for i, text in texts.items()}
    other = dict(zip(texts, draw.permutation(list(texts.values())).tolist(), strict=True))
    alike, chance = (compare(labels("a", texts), labels("b", b)).wording for b in (same, other))
    assert alike is not None
    assert chance is not None
    assert alike.above_shuffled is not None
    assert alike.above_shuffled > 0.99
    assert chance.above_shuffled == pytest.approx(0.5, abs=0.08)
    assert chance.mean == pytest.approx(chance.shuffled, abs=0.03)
    again = compare(labels("a", texts), labels("b", same)).wording
    assert again == alike
    assert compare(labels("a", texts), labels("b", same), seed=1).wording != alike


def test_labellers_without_a_feature_in_common() -> None:
    found = compare(labels("a", {0: "x"}), labels("b", {1: "y"}))
    assert (found.both, found.wording, found.scores, found.pairs) == (0, None, {}, [])
    assert (found.a.alone, found.b.alone) == (1, 1)
