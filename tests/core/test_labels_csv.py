"""Labels as CSV: what spreadsheets are given, and what is read back."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.labels.csv_file import read_csv, to_csv


def test_csv_gives_back_what_it_was_given(tmp_path: Path) -> None:
    made = LabelSet(
        "me",
        [
            Label(
                7, '=1+2, "quoted"; naïve 漢', "me", 0.25, "fuzz", "gpt", "2026-01-02", 20, "ann"
            ),
            Label(
                2,
                "dogs",
                "me",
                0.7,
                detection=0.8,
                fuzzing=0.6,
                scorer="m",
                scored_on="2026-02-03",
                scoring="detection@1:2 fuzzing@3:2",
                positives=20,
                negatives=19,
            ),
        ],
    )
    file = tmp_path / "x.csv"
    file.write_text(to_csv(made), encoding="utf-8-sig")
    assert list(read_csv(file)) == list(made)
    assert {label.labeller for label in read_csv(file, "you")} == {"you"}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "'", "'=", "''-", "'a", "''"])
def test_a_csv_has_no_formula_and_still_gives_back_what_it_was_given(
    tmp_path: Path, start: str
) -> None:
    text = f'{start}HYPERLINK("http://evil")'
    made = LabelSet(start, [Label(7, text, start, author=f"{start}x"), Label(8, "it's 'a'", start)])
    file = tmp_path / "x.csv"
    file.write_text(to_csv(made), newline="")
    assert list(read_csv(file)) == list(made)
    with file.open(newline="") as opened:
        cells = [cell for row in csv.reader(opened) for cell in row]
    assert not [cell for cell in cells if cell[:1] in set("=+-@\t\r")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column 'index'; its first line names the columns"),
        ("index,label\n1,a\n", "has a column 'label'; the columns are index, text, labeller"),
        ("index,text\n1,a\n", r"has no column 'labeller' \(or give one with --labeller\)"),
        ("index,text,labeller\n", "holds no labels below its column names"),
        ("index,text,labeller\nx,a,me\n", "line 2 of .* is not a label .*index"),
        ("index,text,labeller\n1,,me\n", "line 2 of .* is not a label .*text"),
        ("index,text,labeller\n1,a,me,more\n", "line 2 of .* is not a label"),
        ("index,text,labeller,score\n1,a,me,nan\n", "line 2 of .* has score nan"),
        ("index,text,labeller\n1,a,me\n2,b,you\n", "line 3 of .* of 'you' but the file is of 'me'"),
        ('index,text,labeller\n1,"a,me\n', "is no CSV in UTF-8"),
        (b"index,text,labeller\n1,\xff,me\n", "is no CSV in UTF-8"),
        ('index,text,labeller\n1,"' + "a" * 200_000 + '",me\n', "is no CSV in UTF-8"),
    ],
)
def test_a_csv_that_holds_no_labels_is_explained(
    tmp_path: Path, text: str | bytes, says: str
) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=says):
        read_csv(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_csv(tmp_path / "none.csv")
