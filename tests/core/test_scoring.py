"""What labels are scored on, how it is asked, and what the answers come to."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from delphi.log.result_analysis import (  # pyright: ignore[reportMissingImports]
    compute_classification_metrics,
    compute_confusion,
)
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core.autointerp import classify
from neuroscope_vllm.core.autointerp.judged import FEWEST, Text, choose_texts
from neuroscope_vllm.core.autointerp.measures import accuracy
from neuroscope_vllm.core.autointerp.negatives import Negatives
from neuroscope_vllm.core.autointerp.prompt import read_prompt
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.examples import ExampleStore
from neuroscope_vllm.core.journal import Journal
from neuroscope_vllm.core.labels import Label
from tests.support.word_features import WINDOW, WordFeatures, word

COMMON, USUAL, TWIN = 0, 30, 1002
"""Features: one that fires in most contexts, one that in few, one whose neighbour fires alone."""


@pytest.fixture(scope="module")
def world() -> WordFeatures:
    return WordFeatures()


@pytest.fixture(scope="module")
def store(world: WordFeatures, tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    folder = tmp_path_factory.mktemp("words") / "examples"
    world.write(folder)
    return ExampleStore(folder)


@pytest.fixture(scope="module")
def contexts(store: ExampleStore) -> Negatives:
    return Negatives(store)


def place(text: Text) -> tuple[int, int]:
    sequence, position = text.id.split(":")
    return int(sequence), int(position)


@pytest.mark.parametrize("feature", [COMMON, 1, USUAL, 45, 1000, TWIN])
def test_texts_are_held_out_and_of_the_class_they_are_said_to_be(
    world: WordFeatures, store: ExampleStore, contexts: Negatives, feature: int
) -> None:
    texts = choose_texts(store, contexts, feature, 20, 20)
    assert len({text.id for text in texts}) == len(texts) >= 30
    for text in texts:
        sequence, position = place(text)
        assert world.held_out(sequence)
        if text.fires:
            assert world.fires(feature)[sequence, position]
            assert word(feature % 1000) in text.tokens
        else:
            assert not world.fires_in(feature, sequence, slice(position, position + WINDOW))
    firing = sorted(place(text) for text in texts if text.fires)
    for (one, first), (other, second) in itertools.pairwise(firing):
        assert one != other or second - first >= WINDOW


def test_half_of_the_negatives_have_a_neighbour_that_fires(
    world: WordFeatures, store: ExampleStore, contexts: Negatives
) -> None:
    texts = choose_texts(store, contexts, TWIN, 20, 20)
    hard = [text for text in texts if text.hard]
    assert len(hard) == 10
    for text in hard:
        sequence, position = place(text)
        assert world.fires_in(TWIN - 1000, sequence, slice(position, position + WINDOW))
    assert contexts.neighbours(TWIN) == [TWIN - 1000]
    # Word 2 fires wherever its only neighbour does, so no context is hard; random ones fill up.
    others = choose_texts(store, contexts, TWIN - 1000, 20, 20)
    assert Counter(text.fires for text in others) == {True: 20, False: 20}
    assert not any(text.hard for text in others)


@pytest.mark.parametrize("feature", [COMMON, USUAL, TWIN])
def test_a_judge_of_lengths_and_marks_learns_nothing(
    store: ExampleStore, contexts: Negatives, feature: int
) -> None:
    texts = choose_texts(store, contexts, feature, 15, 15)
    shapes = [
        Counter(tuple(t.marked) for t in texts if t.fires is fires) for fires in (True, False)
    ]
    assert shapes[0] == shapes[1]
    assert all(any(text.marked) and len(text.marked) == len(text.tokens) for text in texts)


def test_positives_are_spread_over_the_strengths(
    world: WordFeatures, store: ExampleStore, contexts: Negatives
) -> None:
    texts = choose_texts(store, contexts, 3, 20, 20)
    strengths = [world.strength[place(text)] for text in texts if text.fires]
    everywhere = world.strength[world.fires(3)]
    ranks = np.searchsorted(np.sort(everywhere), strengths) / len(everywhere)
    assert abs(ranks.mean() - 0.5) < 0.1
    assert (ranks < 0.2).any()
    assert (ranks > 0.8).any()


def test_the_same_texts_come_in_the_same_order_each_time(
    store: ExampleStore, contexts: Negatives
) -> None:
    once, again = (choose_texts(store, contexts, USUAL, 20, 20) for _ in range(2))
    assert once == again
    fires = [text.fires for text in once]
    assert fires != sorted(fires)
    assert fires != sorted(fires, reverse=True)
    assert fires != [text.fires for text in choose_texts(store, contexts, USUAL + 1, 20, 20)]


def test_too_few_texts_are_none(store: ExampleStore, contexts: Negatives) -> None:
    found = {f: len(choose_texts(store, contexts, f, 20, 20)) for f in (50, 55, 59, 1999)}
    assert found[50] >= 2 * FEWEST
    assert (found[55], found[59], found[1999]) == (0, 0, 0)


TEXTS = [
    Text(id="1:2", fires=True, tokens=["a", " b", "\n", " c"], marked=[False, True, True, False]),
    Text(id="1:9", fires=False, tokens=[" {label}", "\u2028d"], marked=[True, False]),
]


def test_only_fuzzing_shows_marks_and_each_text_has_a_line() -> None:
    prompt = read_prompt("detection", classify.FIELDS)
    asked = classify.question("k", "detection", prompt, "about {texts}", TEXTS)
    assert asked.user == "Label: about {texts}\n\nText 1: a b⏎ c\nText 2:  {label}⏎d"
    asked = classify.question("k", "fuzzing", prompt, "x", TEXTS)
    assert asked.user.endswith("Text 1: a<< b⏎>> c\nText 2: << {label}>>⏎d")
    assert asked.schema["required"] == ["text_1", "text_2"]
    assert classify.judgements({"text_2": 1, "text_1": 0}, 2) == [0, 1]


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.md"
    file.write_text("Task.\n---\n{label} {other} {texts}\n")
    mine = read_prompt("detection", classify.FIELDS, file)
    assert (mine.name, mine.system) == ("mine", "Task.")
    assert mine.fill(label="{texts}", texts="t") == "{texts} {other} t"
    assert mine.digest != read_prompt("detection", classify.FIELDS).digest
    for text, says in (
        ("no line", "has no line with ---"),
        ("a\n---\n{label}", r"has no \{texts\} after it"),
        (b"\xff\n---\n", "can not be read"),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=says):
            read_prompt("detection", classify.FIELDS, file)
    with pytest.raises(ConfigError, match="can not be read"):
        read_prompt("detection", classify.FIELDS, tmp_path / "none.md")


def delphis(judged: list[tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Confusion and metrics as eai-delphi computes them, from its own columns."""
    frame = pandas.DataFrame(judged, columns=["activating", "prediction"])
    confusion = compute_confusion(frame.astype(bool))
    return confusion, compute_classification_metrics(confusion)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60))
def test_any_answers_are_worth_what_delphi_says(judged: list[tuple[int, int]]) -> None:
    ours, (confusion, theirs) = accuracy(judged), delphis(judged)
    for name in ("true_positives", "false_positives", "true_negatives", "false_negatives"):
        assert getattr(ours, name) == confusion[name]
    assert (ours.balanced, ours.f1) == pytest.approx((theirs["accuracy"], theirs["f1_score"]))
    assert (ours.precision, ours.recall) == (theirs["precision"], theirs["recall"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b'{"index":1}\n', b'{"index":1}\n'),
        (b'{"index":1}\n{"ind', b'{"index":1}\n'),
        (b'{"ind', b""),
        (b'{"index":1}', b'{"index":1}\n'),
    ],
)
def test_a_journal_goes_on_after_the_last_whole_line(
    tmp_path: Path, before: bytes, after: bytes
) -> None:
    path = tmp_path / "x" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(before)
    with Journal(path) as journal:
        journal.add(Label(2, "b", "me"))
        assert path.read_bytes() == after + b'{"index":2,"text":"b","labeller":"me"}\n'
