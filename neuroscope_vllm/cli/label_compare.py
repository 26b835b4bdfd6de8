"""How `neuroscope labels compare` shows two labellers: in a terminal, and as a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuroscope_vllm.core.html_page import filled
from neuroscope_vllm.core.labels.compare import Comparison, Pair, Paired, Side, Wording

Cell = str | dict[str, Any]
"""Text, or text with `unreliable`."""
WORDING_NOTE = (
    "TF-IDF cosine of the two texts of a feature, over words and runs of 3 to 5 characters: of "
    "wording, not of meaning. Shuffled: with one labeller's texts dealt out to other features."
)
SCORES_NOTE = "Over the features that both have scores of; ± is the standard error."
PAIRS_NOTE = "By the gap of their scores, then by their wording, least alike first."


class Shown(msgspec.Struct):
    """A table, for either form."""

    heading: str
    note: str
    columns: list[str]
    rows: list[list[Cell]]


def print_comparison(found: Comparison) -> None:
    console = Console()
    for shown in _tables(found):
        table = Table(title=Text(shown.heading), title_justify="left", box=None, pad_edge=False)
        for column in shown.columns:
            table.add_column(Text(column), overflow="fold")
        for row in shown.rows:
            table.add_row(*(Text(_plain(cell)) for cell in row))
        console.print(table)
        if shown.note:
            console.print(Text(shown.note, style="dim"))
        console.print()


def comparison_page(found: Comparison, source: str) -> str:
    """One HTML file."""
    data = {
        "title": f"Labels of {found.a.labeller} and of {found.b.labeller}",
        "about": [f"SAE {source}", f"{found.both:,} features have labels of both."],
        "tables": msgspec.to_builtins(_tables(found)),
    }
    return filled("neuroscope_vllm.core.labels", "compare.html", data)


def _tables(found: Comparison) -> list[Shown]:
    a, b = found.a.labeller, found.b.labeller
    tables = [
        Shown(
            "coverage",
            f"{found.both:,} features have labels of both.",
            ["labeller", "labels", "only theirs", "scored", "unreliable", "mean score"],
            [_side(found.a), _side(found.b)],
        )
    ]
    if found.wording is not None:
        columns = ["features", "alike", "shuffled", "more alike than shuffled", "identical"]
        tables.append(
            Shown("wording", WORDING_NOTE, columns, [_wording(found.both, found.wording)])
        )
    if found.scores:
        columns = ["", "features", a, b, "difference", "Spearman", f"{a} wins", f"{b} wins", "ties"]
        rows = [_paired(name, one) for name, one in found.scores.items()]
        tables.append(Shown("scores", SCORES_NOTE + _unlike(found.scores.values()), columns, rows))
    if found.pairs:
        columns = ["index", a, "score", b, "score", "alike"]
        rows = [_pair(pair) for pair in found.pairs]
        tables.append(Shown("where they differ most", PAIRS_NOTE, columns, rows))
    return tables


def _side(side: Side) -> list[Cell]:
    counts = (side.labels, side.alone, side.scored, side.unreliable)
    return [side.labeller, *(f"{count:,}" for count in counts), _number(side.mean_score)]


def _wording(features: int, wording: Wording) -> list[Cell]:
    return [
        f"{features:,}",
        _number(wording.mean, wording.standard_error),
        _number(wording.shuffled),
        "" if wording.above_shuffled is None else f"{wording.above_shuffled:.1%}",
        f"{wording.identical:,}",
    ]


def _paired(name: str, one: Paired) -> list[Cell]:
    return [
        name,
        f"{one.features:,}",
        _number(one.a),
        _number(one.b),
        _number(one.difference, one.standard_error, sign="+"),
        _number(one.spearman),
        *(f"{count:,}" for count in (one.wins_a, one.wins_b, one.ties)),
    ]


def _unlike(scores: Iterable[Paired]) -> str:
    other = max(one.features - one.alike for one in scores)
    return f" {other:,} were scored by another method or model." if other else ""


def _pair(pair: Pair) -> list[Cell]:
    return [
        str(pair.index),
        {"text": pair.text_a, "unreliable": pair.unreliable_a},
        _number(pair.score_a),
        {"text": pair.text_b, "unreliable": pair.unreliable_b},
        _number(pair.score_b),
        _number(pair.similarity),
    ]


def _number(value: float | None, error: float | None = None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def _plain(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return cell["text"] + (" (unreliable)" if cell["unreliable"] else "")
