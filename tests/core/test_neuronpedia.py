"""Neuronpedia's exports: what is fetched, what is read, and what becomes a label."""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core.errors import ConfigError, DownloadError
from neuroscope_vllm.core.labels import Label, neuronpedia_export
from neuroscope_vllm.core.labels.neuronpedia import (
    LEAKED,
    MAX_CHARS,
    local_files,
    read_explanations,
    sanitise,
)
from neuroscope_vllm.core.labels.neuronpedia_export import BASE_VARIABLE, fetch_explanations
from tests.support.bucket import SOURCE, Bucket, jsonl, row, serve_bucket

WIDTH = 16384


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("NEUROSCOPE_CACHE", str(tmp_path / "cache"))
    with serve_bucket() as bucket:
        monkeypatch.setenv(BASE_VARIABLE, bucket.url + "/")
        yield bucket


def batches(bucket: Bucket) -> list[str]:
    return sorted(key for key in bucket.objects if "explanations" in key)


def test_a_source_is_fetched_whatever_its_order_and_pages(bucket: Bucket) -> None:
    bucket.put([row(i, f"meaning {i}") for i in range(WIDTH) if i % 7], batch=512)
    bucket.objects[f"v1/{SOURCE}/features/batch-0.jsonl.gz"] = b"not asked for"
    bucket.objects[f"v1/{SOURCE}-x/explanations/batch-0.jsonl.gz"] = b"of another source"
    bucket.objects[f"v1/{SOURCE}/explanations/../../../../escaped.jsonl"] = b"not ours"
    bucket.page, bucket.busy_every, bucket.pause = 7, 5, 0.05
    bucket.cut = {batches(bucket)[3]}
    counts: list[tuple[int, int]] = []
    files = fetch_explanations(SOURCE, lambda done, total: counts.append((done, total)))
    assert len(files) == 28
    assert counts == [(n, 28) for n in range(29)]
    assert [file.name for file in files[:3]] == [f"batch-{n}.jsonl.gz" for n in range(3)]
    assert bucket.asked.count("") == 5
    assert 1 < bucket.most_at_once <= 6
    read = read_explanations(files, SOURCE, WIDTH)
    assert {label.index for label in read.labels} == {i for i in range(WIDTH) if i % 7}
    assert all(label.text == f"meaning {label.index}" for label in read.labels)
    assert not list(files[0].parent.glob("*.partial"))


def test_what_was_fetched_is_not_fetched_again(bucket: Bucket) -> None:
    bucket.put([row(i, "x") for i in range(40)], batch=4)
    bucket.forbidden = {batches(bucket)[8]}
    with pytest.raises(DownloadError, match=r"could not be fetched from .*403.*; try again"):
        fetch_explanations(SOURCE)
    had = set(bucket.fetched()) - bucket.forbidden
    bucket.forbidden = set()
    bucket.asked.clear()
    files = fetch_explanations(SOURCE)
    assert set(bucket.fetched()) == set(batches(bucket)) - had
    files[2].write_bytes(files[2].read_bytes()[:-1])
    files[5].unlink()
    bucket.asked.clear()
    assert fetch_explanations(SOURCE) == files
    assert [key.rpartition("/")[2] for key in bucket.fetched()] == [files[2].name, files[5].name]
    assert len(read_explanations(files, SOURCE, WIDTH).labels) == 40


def test_a_source_that_is_not_there_is_said(bucket: Bucket) -> None:
    with pytest.raises(DownloadError, match="has no explanations of gpt2-small/6-res-jb; look"):
        fetch_explanations("gpt2-small/6-res-jb")


@pytest.mark.parametrize("identifier", ["gemma-2-2b", "a/b/c", "../x", "a/..", "a/b?c", "", "a/ b"])
def test_what_is_no_source_is_refused(bucket: Bucket, identifier: str) -> None:
    with pytest.raises(ConfigError, match="is no source of Neuronpedia; write MODEL/SOURCE"):
        fetch_explanations(identifier)
    assert bucket.asked == []


def test_a_mirror_that_is_none_is_said(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia_export, "ATTEMPTS", 2)
    bucket.busy_every = 1
    with pytest.raises(DownloadError, match="503"):
        fetch_explanations(SOURCE)
    assert bucket.asked == []
    monkeypatch.setattr(Bucket, "listing", lambda *_: "<html>a captive portal<br></html>")
    bucket.busy_every = 0
    with pytest.raises(DownloadError, match="the listing is not S3's"):
        fetch_explanations(SOURCE)
    for base in ("http://127.0.0.1:9", "ftp://mirror", "http://[half"):
        monkeypatch.setenv(BASE_VARIABLE, base)
        with pytest.raises(DownloadError, match="could not be fetched from"):
            fetch_explanations(SOURCE)


def write(folder: Path, *rows: dict[str, Any], name: str = "batch-0.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = jsonl(rows)
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def test_author_method_and_model_are_kept(tmp_path: Path) -> None:
    file = write(tmp_path, row(12082, "references to **dogs**", createdAt="2025-06-01T10:00:00"))
    (label,) = read_explanations([file], SOURCE, WIDTH).labels
    assert label == Label(
        index=12082,
        text="references to dogs",
        labeller="neuronpedia",
        method="np_acts-logits-general",
        model="gemini-2.5-flash-lite",
        author="clkht01d40000jv08hvalcvly",
        created="2025-06-01T10:00:00",
    )


def test_of_several_the_best_scored_else_the_newest_else_the_last_is_taken(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        *(row(1, "good", scores=[{"value": 0.8}]), row(1, "bad", scores=[{"value": 0.3}])),
        *(row(1, "unscored", createdAt="2026-01-01"), row(1, "odd", scores=[{"value": 7}])),
        *(row(2, "new", createdAt="2026-01-02"), row(2, "old", createdAt="2025-01-02")),
        *(row(3, "first"), row(3, "last"), row(3, "The user wants a label")),
    )
    read = read_explanations([file], SOURCE, WIDTH)
    assert [(label.index, label.text) for label in read.labels] == [
        *((1, "good"), (2, "new"), (3, "last"))
    ]
    assert (read.leaked, read.empty, read.others) == (1, 0, 5)


def test_folders_and_files_are_read_by_number(tmp_path: Path) -> None:
    inside = tmp_path / "export" / "explanations"
    for number in (10, 9, 0):
        write(inside, row(1, f"from {number}"), name=f"batch-{number}.jsonl.gz")
    (tmp_path / "export" / "source.jsonl").write_text('{"id": "not an explanation"}\n')
    files = local_files([tmp_path / "export"])
    assert [file.name for file in files] == [f"batch-{n}.jsonl.gz" for n in (0, 9, 10)]
    assert [label.text for label in read_explanations(files, SOURCE, 2).labels] == ["from 10"]
    with pytest.raises(ConfigError, match=r"x has no explanations; give .jsonl or .jsonl.gz"):
        local_files([tmp_path / "x"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (row(16384, "x"), "line 2 of .* is of feature 16384, but the SAE has 16,384 features"),
        (row(1, "x", index="-1"), "line 2 of .* has index '-1', which is no feature's number"),
        (row(1, "x", index="1" * 5000), "line 2 of .* has index '1111"),
        (row(1, "x", index="١"), "which is no feature's number"),
        (row(1, "x", layer="5-res"), "is of gemma-2-2b/5-res, not of gemma-2-2b/20-gemma"),
        (row(1, 7), "line 2 of .* is no explanation .*description"),
        ({"index": "1", "maxActApprox": 3.2}, "is no explanation .*missing .*description"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    file = write(tmp_path, row(0, "fine"), given)
    with pytest.raises(ConfigError, match=says):
        read_explanations([file], SOURCE, WIDTH)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl([row(i, f"text {i}") for i in range(500)]))
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    for name, content in {"cut": whole[: len(whole) // 2], "bits": middle, "text": b"{}"}.items():
        file = tmp_path / f"{name}.jsonl.gz"
        file.write_bytes(content)
        says = rf"{name}.jsonl.gz is (cut off or damaged|no explanation)"
        with pytest.raises(ConfigError, match=says):
            read_explanations([file], SOURCE, WIDTH)
    (tmp_path / "half.jsonl").write_bytes(jsonl([row(0, "fine")]) + b'{"index": "1", "descr')
    with pytest.raises(ConfigError, match=r"line 2 of .*half.jsonl is no explanation"):
        read_explanations([tmp_path / "half.jsonl"], SOURCE, WIDTH)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_explanations([tmp_path / "none.jsonl"], SOURCE, WIDTH)


def test_hostile_texts_become_short_plain_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        row(0, "z" * 10_000_000),
        row(1, '"' * 3000 + "x" + '"' * 3000),
        row(2, "\x1b]0;title\x07\x1b[2J right\u202eleft\u2066 <script>alert(1)</script>"),
        row(3, "\u200b\u2060 \n"),
        row(4, "a\u2028b\r\nc"),
        row(5, "x" * 5_000_000 + " The user wants"),
    )
    read = read_explanations([file], SOURCE, WIDTH)
    assert {label.index: label.text for label in read.labels} == {
        0: "z" * 119 + "…",
        1: '"' * 119 + "…",
        2: "]0;title[2J rightleft <script>alert(1)</script>",
        4: "a b c",
    }
    assert (read.leaked, read.empty) == (1, 1)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("dogs", "dogs"),
        ("  two\n lines ", "two lines"),
        ('"references to dogs"', "references to dogs"),
        ("“San Francisco”", "San Francisco"),
        ('"cat" and "dog"', '"cat" and "dog"'),
        ("**Bold** and *soft* `code`", "Bold and soft code"),
        ("## - heading", "heading"),
        ("* item", "item"),
        ("the * operator, 2*3*4, __init__ and snake_case", None),
        ("\"**'deep'**\"", "deep"),
        ("", ""),
        ("** **", "** **"),
        ("word " * 40, ("word " * 40)[:119].rstrip() + "…"),
    ],
)
def test_explanations_lose_quotes_and_markup(text: str, label: str | None) -> None:
    assert sanitise(text) == (text if label is None else label)


@pytest.mark.parametrize(
    "text",
    [
        "The user wants a short label for this",
        "MAX_ACTIVATING_TOKENS: dog, cat",
        "x" * 500 + "\nTOP_POSITIVE_LOGITS",
        "Method 1 fails, so Method 2",
        "The **user** wants a label",
        "<think>hmm</think> the label",
        "<think>\nOkay, so the tokens are all about dogs.\n</think>\n\ndogs",
        "<think> Let me look, and never come to an end",
        "Okay, let me look at the tokens: x",
        "Alright, let's see. The activations are on dogs",
        "Hmm, so let me think about these examples",
        "Let me analyze the activating tokens",
        "I need to find what the neuron is for",
    ],
)
def test_leaks_are_no_labels(text: str) -> None:
    assert sanitise(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "first, second and third in lists of texts",
        "Okay, alright and other interjections",
        "okay, let me",
        "phrases like 'let me see' before examples",
        "let's go",
        "Let me tell you",
        "I need to buy tokens",
        "let me know if you have any questions",
        "the user's wants and needs",
        "thinking, <thinking> in XML",
        '"<think>" and "</think>" tags',
        "<think> and </think>",
        "<think> tags that open a model's reasoning",
        "labels: what names a thing",
        "explanations, reasons and examples",
        "explanation of methods in papers",
        "label: in YAML",
        "well, well, well",
        "First, an enumeration of features",
        "now, so, then: adverbs of time in texts",
        "OK buttons and Cancel labels",
        "Right, left: directions in a text",
    ],
)
def test_ordinary_labels_stay_as_they_are(text: str) -> None:
    assert sanitise(text) == text


@pytest.mark.parametrize(
    "marked",
    [
        *("Explanation: dogs", "EXPLANATION:dogs", "[EXPLANATION]: dogs", "Label: dogs"),
        *("**Explanation:** dogs", '**[Explanation]**: "dogs"', "Explanation: Label: `dogs`"),
    ],
)
def test_the_marker_of_an_answer_is_taken_off(marked: str) -> None:
    assert sanitise(marked) == "dogs"


MARKED = st.text(
    st.sampled_from(list("ab1 *`\"'“”‘’«»#->•_[]…\n\t\x1b\u202e\u200b\u200c\ud800é漢")),
    max_size=300,
)


@given(st.one_of(MARKED, st.text(max_size=300)))
def test_what_is_sanitised_is_one_short_line_and_stays_so(text: str) -> None:
    label = sanitise(text)
    if label is None:
        assert LEAKED.search(text) or LEAKED.search(" ".join(text.split())) or "*" in text
        return
    assert sanitise(label) == label
    assert len(label) <= MAX_CHARS
    assert label == label.strip()
    assert len(label.splitlines()) <= 1
    assert all(unicodedata.category(c)[0] != "C" or c in "\u200c\u200d" for c in label)
