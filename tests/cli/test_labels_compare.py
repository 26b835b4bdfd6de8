"""`neuroscope labels compare` from the outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from tests.support.browser import needs_browser, opened


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROSCOPE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["labels", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def mine(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.csv").write_text(text)
    return str(tmp_path / "mine.csv")


def both_labellers(tmp_path: Path) -> None:
    evil = "<script>window.owned = 1</script>"
    ours = "index,text,score\n1,dogs,0.9\n2,[red]cats[/],0.8\n3,\x1b[31mRome,\n"
    theirs = f"index,text,score\n1,dogs and cats,0.5\n2,{evil},0.9\n9,x,\n"
    for name, text in (("ann", ours), ("bob", theirs)):
        assert run("import", mine(tmp_path, text), "--labeller", name)[0] == 0


def test_compare_shows_two_labellers_side_by_side(tmp_path: Path) -> None:
    both_labellers(tmp_path)
    code, out, _ = run("compare", "ann", "bob")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["ann", "3", "1", "2", "0", "0.850"] in lines
    assert ["bob", "3", "1", "2", "1", "0.700"] in lines
    assert ["score", "2", "0.850", "0.700", "+0.150", "±", "0.250", "1", "1", "0"] in lines
    assert "dogs and cats (unreliable)" in out
    assert "[red]cats[/]" in out
    assert "\x1b" not in out
    assert out.index("dogs and cats") < out.index("[red]cats[/]")  # the larger gap first
    found = json.loads(run("compare", "ann", "bob", "--json", "--limit", "1")[1])
    assert (found["both"], found["b"]["unreliable"], found["scores"]["score"]["wins_a"]) == (
        2,
        1,
        1,
    )
    assert [pair["index"] for pair in found["pairs"]] == [1]


def test_compare_writes_a_page_that_loads_nothing_and_obeys_no_label(tmp_path: Path) -> None:
    both_labellers(tmp_path)
    page = tmp_path / "page.html"
    code, out, err = run("compare", "ann", "bob", "--html", str(page))
    assert (code, out) == (0, "")
    assert f"Wrote {page}" in err
    html = page.read_text()
    assert "<script>window" not in html
    assert not re.search(r"https?://|src=|href=", html)
    assert "default-src 'none'; script-src 'sha256-" in html
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert data["title"] == "Labels of ann and of bob"
    assert [table["heading"] for table in data["tables"]] == [
        *("coverage", "wording", "scores", "where they differ most"),
    ]


@needs_browser
def test_the_page_of_a_comparison_in_a_browser(tmp_path: Path) -> None:
    both_labellers(tmp_path)
    page = tmp_path / "page.html"
    assert run("compare", "ann", "bob", "--html", str(page))[0] == 0
    with opened(page, tmp_path / "profile") as browser:
        assert browser.run("document.querySelectorAll('table').length") == 4
        doubted = "[...document.querySelectorAll('.doubt')].map(e => e.textContent)"
        assert browser.run(doubted) == ["dogs and cats ?"]
        assert browser.run("document.body.textContent.includes('<script>window.owned')")
        assert browser.run("window.owned === undefined")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("ann", "nobody"), 1, "no labels of 'nobody'"),
        (("ann",), 2, "Missing argument"),
        (("ann", "bob", "--json", "--html", "x"), 2, "exclude each other"),
        (("ann", "bob", "--html", "/no/such/x"), 1, "/no/such/x can not be used"),
        (("ann", "bob", "--sae", "no/such"), 1, "SAE no/such does not exist"),
    ],
)
def test_mistakes_in_compare_are_explained(
    tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    both_labellers(tmp_path)
    got, _, err = run("compare", *words)
    assert got == code
    assert says in err
    assert "Traceback" not in err
