"""The figures of what steering did to an answer."""

from __future__ import annotations

import difflib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core.steering.effect import Activity, changed, distinct, parting, perplexity

TOKENS = st.lists(st.integers(0, 3), max_size=12)


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity([math.log(1 / 50)] * 7) == pytest.approx(50)
    assert perplexity([]) is None
    assert perplexity([-9999.0]) == math.inf


def test_perplexity_is_torchs_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 100, generator=generator).double()
    ids = torch.randint(100, (40,), generator=generator)
    chosen = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()
    expected = torch.nn.functional.cross_entropy(logits, ids).exp().item()
    assert perplexity(chosen) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("one", "other", "at"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([], [4], 0),
        ([], [], None),
    ],
)
def test_parting(one: list[int], other: list[int], at: int | None) -> None:
    assert parting(one, other) == at == parting(other, one)


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("kitten", "sitting", 3 / 7),
        ("flaw", "lawn", 2 / 4),
        ("abc", "abc", 0.0),
        ("abc", "xyz", 1.0),
        ("abc", "", 1.0),
        ("", "", 0.0),
    ],
)
def test_changed_is_levenshteins_distance_over_the_longer(
    one: str, other: str, share: float
) -> None:
    assert changed([*map(ord, one)], [*map(ord, other)]) == share


@given(TOKENS, TOKENS)
def test_changed_lies_within_its_bounds(one: list[int], other: list[int]) -> None:
    share, longer = changed(one, other), max(len(one), len(other), 1)
    assert share == changed(other, one)
    assert (share == 0) == (one == other)
    assert abs(len(one) - len(other)) / longer <= share <= 1
    # Any alignment costs as much as the best one, or more.
    kept = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    same = sum(block.size for block in kept)
    assert share <= (len(one) + len(other) - 2 * same) / longer


def test_distinct() -> None:
    assert distinct([1, 2, 3, 4]) == 1.0
    assert distinct([1, 2, 1, 2, 1]) == 2 / 4
    assert distinct([5] * 9) == 1 / 8
    assert distinct([5]) is None
    assert distinct([5, 5, 6], 1) == 2 / 3


def test_activity() -> None:
    assert Activity.of([0.0, 3.0, 1.5]) == Activity(1.5, 3.0, 3)
    assert Activity.of([]) is None
