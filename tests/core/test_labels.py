"""Label files: what is read, what is refused, and what a search finds first."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import (
    MAX_LABEL_CHARS,
    Label,
    LabelSet,
    clean_label,
    load_labels,
)


def labels(*texts: str) -> LabelSet:
    return LabelSet("me", (Label(i, text, "me") for i, text in enumerate(texts)))


def test_what_is_saved_is_loaded_in_order_of_index(tmp_path: Path) -> None:
    full = Label(7, "“Paris” → of", "me", 0.8, "fuzz", "gpt", "2026-01-02")
    saved = LabelSet("me", [full, Label(2, "dogs", "me")])
    saved.save(tmp_path / "new" / "me.jsonl")
    assert (tmp_path / "new" / "me.jsonl").read_text().startswith('{"index":2,"text":"dogs",')
    loaded = load_labels(tmp_path / "new" / "me.jsonl")
    assert list(loaded) == [Label(2, "dogs", "me"), full]
    assert (loaded.labeller, len(loaded), loaded.get(7), loaded.get(3)) == ("me", 2, full, None)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["me.jsonl"]


def test_a_later_label_replaces_an_earlier_one() -> None:
    both = LabelSet("me", [Label(1, "a", "me"), Label(1, "b", "me")])
    assert [label.text for label in both] == ["b"]


def test_a_search_wants_every_word_and_puts_whole_words_first() -> None:
    found = labels("scatter plots", "category theory", "wild cats", "Cat", "dogs", "cat and dog")
    assert [label.text for label in found.search("CAT")] == [
        "Cat",
        "cat and dog",
        "wild cats",
        "category theory",
        "scatter plots",
    ]
    assert [label.text for label in found.search("dog cat")] == ["cat and dog"]
    assert [label.index for label in found.search("cat", limit=2)] == [3, 5]
    assert found.search("zebra") == found.search("  ") == []


def test_a_search_takes_the_query_as_it_is() -> None:
    assert [label.index for label in labels("c++ code", "c code", "STRASSE").search("C++")] == [0]
    assert [label.index for label in labels("x", "Straße").search("STRASSE")] == [1]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two\n lines\t", "two lines"),
        ("\x1b[31mred\x07\x00", "[31mred"),
        ("right\u202eleft\ufeff", "rightleft"),
        ("\ud800half", "half"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 199 + "…"),
    ],
)
def test_labels_are_cleaned(raw: str, clean: str) -> None:
    assert clean_label(raw) == clean
    assert len(clean) <= MAX_LABEL_CHARS
    assert LabelSet("me", [Label(0, raw, "me")]).get(0) == Label(0, clean, "me")


GOOD = '{"index": 1, "text": "a", "labeller": "me"}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + "{oops\n", "line 2 of .* is not a label"),
        ("\n" + GOOD + '{"index": "1", "text": "a", "labeller": "me"}', "line 3 .*got `str`"),
        ('{"index": 1, "labeller": "me"}', "line 1 .*missing required field `text`"),
        ('{"index": -1, "text": "a", "labeller": "me"}', "line 1 of .* has index -1; indices"),
        ('{"index": 1, "text": " \\n ", "labeller": "me"}', "line 1 of .* has an empty text"),
        ('{"index": 1, "text": "a", "labeller": ""}', "line 1 of .* names no labeller"),
        (GOOD + '{"index": 2, "text": "a", "labeller": "you"}', "line 2 .* of 'you' but the file"),
        ("\n", "holds no labels; make them with"),
    ],
)
def test_a_line_that_is_not_a_label_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_labels(tmp_path / "x.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"labels .*x.jsonl cannot be read \(No such file"):
        load_labels(tmp_path / "x.jsonl")


def test_a_label_of_another_labeller_is_refused() -> None:
    with pytest.raises(ConfigError, match="a label of 'you' was given to the labels of 'me'"):
        LabelSet("me", [Label(0, "a", "you")])
