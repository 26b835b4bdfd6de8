"""Label files: what is read, what is refused, and what a search finds first."""

from __future__ import annotations

import json
import logging
import threading
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import (
    MAX_LABEL_CHARS,
    Label,
    LabelSet,
    Summary,
    clean_label,
    load_labels,
    preference,
    search,
    stored_labels,
)
from neuroscope_vllm.core.launch import label_files


def labels(*texts: str) -> LabelSet:
    return LabelSet("me", (Label(i, text, "me") for i, text in enumerate(texts)))


def test_what_is_saved_is_loaded_in_order_of_index(tmp_path: Path) -> None:
    full = Label(7, "“Paris” → of", "me", 0.8, "fuzz", "gpt", "2026-01-02", 20, "ann")
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
        "wild cats",
        "cat and dog",
        "category theory",
        "scatter plots",
    ]
    assert [label.text for label in found.search("dog cat")] == ["cat and dog"]
    assert [label.index for label in found.search("cat", limit=2)] == [3, 2]
    assert found.search("zebra") == found.search("  ") == found.search("cat", limit=0) == []


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("C++", [0]),  # not every C
        ("STRASSE", [2]),
        ("cafes", [3]),
        ("running", [4]),
        ("京", [5]),
        ("हिन्दी", [6]),
        ("ＡＢＣ", [7]),
        ("__init__", [8]),
        ('"quoted"', [9]),
        ("100%", [10]),
        ("NOT", [11]),
        ("und cake", [11]),
    ],
)
def test_a_search_takes_the_query_as_it_is(query: str, found: list[int]) -> None:
    known = labels(
        *("c++ code", "c code", "Straße", "Café", "she runs", "東京タワー", "हिन्दी शब्द", "abc"),
        *("the __init__ method", 'a "quoted" word', "100% sure", "cake und not bread"),
    )
    assert [label.index for label in known.search(query)] == found


HOSTILE = st.text(
    st.sampled_from(list("ab\"*()^:+-{}'%_;,.~|&\\\0\n \ud800漢é²ſıß")) | st.characters(),
    max_size=40,
)


@given(HOSTILE)
def test_no_query_is_an_error(query: str) -> None:
    assert isinstance(SEARCHED.search(query), list)
    assert SEARCHED.search(f"{query} zzzz") == []


SEARCHED = labels(
    'a AND b OR "c" NEAR(d, 2)', "text: x^2 * y", "漢字 is é", "%_'; DROP TABLE found"
)


@pytest.mark.parametrize(
    "query",
    [
        "AND",
        "a OR",
        "NEAR(a b, 3)",
        "text:x",
        "a" * 100_000,
        "b " * 20_000,
        '"',
        "*",
        "a*",
        "^x",
        "\0",
    ],
)
def test_operators_of_sqlite_are_words(query: str) -> None:
    assert isinstance(SEARCHED.search(query), list)


@given(st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1), min_size=1))
def test_every_label_is_found_by_each_part_of_its_text(texts: list[str]) -> None:
    known = labels(*texts)
    for label in known:
        for word in label.text.split():
            assert label in known.search(word, len(known))


def test_what_is_added_after_a_search_is_found_too() -> None:
    known = labels("dogs")
    assert known.search("cats") == []
    known.add(Label(5, "cats", "me"))
    known.add(Label(0, "cows", "me"))
    assert [label.index for label in known.search("cats")] == [5]
    assert known.search("dogs") == []


def test_any_thread_may_search() -> None:
    known = labels(*(f"number {i} of many" for i in range(500)))
    wrong: list[int] = []

    def search(thread: int) -> None:
        for i in range(thread, 500, 8):
            if [label.index for label in known.search(f"{i} number", 1)] != [i]:
                wrong.append(i)

    threads = [threading.Thread(target=search, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_python_without_full_text_search_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # SQLite's own error, for a module that no build has.
    monkeypatch.setattr(search, "_TABLE", search._TABLE.replace("fts5", "fts99"))
    with pytest.raises(ConfigError, match=r"no full-text search \(no such module: fts99\); use"):
        labels("dogs").search("dogs")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two\n lines\t", "two lines"),
        ("\x1b[31mred\x07\x00", "red"),
        ("right\u202eleft\ufeff", "rightleft"),
        ("\ud800half", "half"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
        ("\u200c \u200d", ""),
        ("\x1b \x1b a", "a"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 199 + "…"),
    ],
)
def test_labels_are_cleaned(raw: str, clean: str) -> None:
    assert clean_label(raw) == clean
    assert len(clean) <= MAX_LABEL_CHARS
    assert LabelSet("me", [Label(0, raw, "me")]).get(0) == Label(0, clean, "me")


@given(st.text(max_size=400), st.integers(1, 300))
def test_what_is_clean_is_one_short_line_and_stays_so(text: str, limit: int) -> None:
    clean = clean_label(text, limit)
    assert clean_label(clean, limit) == clean
    assert len(clean) <= limit
    assert len(clean.splitlines()) <= 1
    assert all(unicodedata.category(c)[0] != "C" or c in "\u200c\u200d" for c in clean)


def test_provenance_is_cleaned_too() -> None:
    dirty = Label(0, "a", "me", method="\x1b[1mfuzz\n", model="m" * 300, author="\u202ebob")
    (label,) = LabelSet("me", [dirty])
    assert (label.method, label.model, label.author) == ("fuzz", "m" * 199 + "…", "bob")


def test_a_score_below_the_line_is_unreliable_and_none_is_unscored() -> None:
    scores = [None, 0.0, 0.59, 0.6, 1.0]
    assert [Label(0, "a", "me", score).unreliable for score in scores] == [
        *(False, True, True, False, False)
    ]
    assert Label(0, "a", "me").to_dict() == {
        "index": 0,
        "text": "a",
        "labeller": "me",
        "score": None,
        "method": None,
        "model": None,
        "created": None,
        "examples": None,
        "author": None,
        "detection": None,
        "fuzzing": None,
        "scorer": None,
        "scored_on": None,
        "scoring": None,
        "positives": None,
        "negatives": None,
        "unreliable": False,
    }


def test_a_summary_counts_what_was_scored() -> None:
    made = [
        Label(0, "a", "me", 0.5, "fuzz", "gpt", "2026-01-02"),
        Label(1, "b", "me", 0.9, "detection", "gpt", "2026-02-01"),
        Label(2, "c", "me"),
    ]
    newest = "2026-02-01"
    assert LabelSet("me", made).summary() == Summary(
        "me", 3, 2, 1, 0.7, ["detection", "fuzz"], ["gpt"], newest
    )
    assert LabelSet("you").summary() == Summary("you", 0, 0, 0, None, [], [], None)


def test_reliable_labellers_come_first_then_unscored_tokens_and_unreliable() -> None:
    sets = [
        LabelSet("poor", [Label(0, "a", "poor", 0.59)]),
        LabelSet("tokens", [Label(0, "a", "tokens")]),
        LabelSet("zoe", [Label(0, "a", "zoe")]),
        LabelSet("good", [Label(0, "a", "good", 0.9), Label(1, "a", "good")]),
        LabelSet("anna", [Label(0, "a", "anna")]),
        LabelSet("fair", [Label(0, "a", "fair", 0.7)]),
    ]
    ordered = sorted(sets, key=preference)
    assert [one.labeller for one in ordered] == ["good", "fair", "anna", "zoe", "tokens", "poor"]


def test_stored_labels_are_found_for_every_sae_in_order_of_preference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NEUROSCOPE_DATA", str(tmp_path / "data"))
    local, hub = str(tmp_path / "sae"), "hf://google/x@main/layer_3"
    LabelSet("tokens", [Label(0, "a", "tokens")]).save(tmp_path / "sae/labels/tokens.jsonl")
    for source, labeller in ((local, "zoe"), (hub, "zoe"), (hub, "begun")):
        LabelSet(labeller, [Label(0, "a", labeller)]).save(artefacts.labels_file(source, labeller))
    begun = artefacts.labels_file(hub, "begun")
    begun.write_text('{"index": 0, "te')
    settings = Settings(sae=[local, "hf://google/x/layer_3"])
    with caplog.at_level(logging.WARNING):
        found = label_files(settings, [20, 3])
    assert [Path(path).name for path in found[20]] == ["zoe.jsonl", "tokens.jsonl"]
    assert found[3] == [str(artefacts.labels_file(hub, "zoe"))]
    assert f"line 1 of {begun} is cut off" in caplog.text
    # One that is damaged does not take the others with it, unless it was asked for.
    bad = artefacts.labels_file(hub, "bad")
    bad.write_text('{"index": 1}\n')
    with caplog.at_level(logging.WARNING):
        assert label_files(settings, [20, 3]) == found
    assert f"line 1 of {bad} is not a label" in caplog.text
    assert "labels of this file are left out" in caplog.text
    with pytest.raises(ConfigError, match="is not a label"):
        label_files(Settings(sae=[local], labels=[str(bad)]), [20])
    bad.unlink()
    assert list(stored_labels(hub)) == [artefacts.labels_file(hub, "zoe")]


def test_given_files_keep_their_order_and_are_the_first_saes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROSCOPE_DATA", str(tmp_path / "data"))
    files = [str(tmp_path / name) for name in ("b.jsonl", "a.jsonl")]
    for file, score in zip(files, (None, 0.9), strict=True):
        LabelSet("x", [Label(0, "a", "x", score)]).save(file)
    settings = Settings(sae=["one", "two"], labels=files)
    assert label_files(settings, [20, 3]) == {20: files, 3: []}
    with pytest.raises(ConfigError, match=r"labels none.jsonl cannot be read"):
        label_files(Settings(sae=["one"], labels=["none.jsonl"]), [20])


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".hidden", "x" * 101, "a\nb", "a\0", "-x", "~"]
)
def test_a_labeller_can_not_lead_out_of_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="can not name a file; use letters, digits"):
        artefacts.labels_file("sae", name)


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
        (
            '{"index": 1, "text": "a", "labeller": "me", "score": 1.5}',
            "line 1 .*has score 1.5; sco",
        ),
        ('{"index": 1, "text": "a", "labeller": "m\x7fe"}', "line 1 .*unprintable characters"),
        ('{"index": 1, "text": "a", "labeller": "me", "examples": -2}', "has -2 examples"),
        ('{"index": 1, "text": "a", "labeller": "me", "fuzzing": -0.1}', "has fuzzing -0.1; sco"),
        ('{"index": 1, "text": "a", "labeller": "me", "negatives": -1}', "has -1 negatives"),
        (GOOD + "\n[1, 2]", "line 3 of .* is not a label"),
        (GOOD + '{"ind\n' + GOOD, "line 2 of .* is not a label"),
        ("\n", "holds no labels; `neuroscope labels"),
        ('{"index"', "holds no labels; `neuroscope labels"),
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


def test_a_file_cut_off_in_its_last_line_loads_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = "".join(
        json.dumps({"index": i, "text": f"Straße {i}", "labeller": "me"}, ensure_ascii=False) + "\n"
        for i in (1, 2, 1)
    ).encode()
    file = tmp_path / "x.jsonl"
    last = lines.rindex(b"{")
    for end in range(last, len(lines) + 1):
        file.write_bytes(lines[:end])
        caplog.clear()
        assert len(load_labels(file)) == 2
        assert ("line 3 of" in caplog.text) == (last < end < len(lines) - 1)


def test_a_later_line_replaces_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(GOOD + GOOD.replace('"a"', '"b"'))
    assert load_labels(file).get(1) == Label(1, "b", "me")
    assert load_labels(file, "you").get(1) == Label(1, "b", "you")
