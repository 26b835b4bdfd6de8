"""How `neuroscope labels` shows what it found, and that it is fetching."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from neuroscope_vllm.core.json_text import to_json
from neuroscope_vllm.core.labels import Label
from neuroscope_vllm.core.labels.neuronpedia_export import fetch_explanations


def print_json(content: Any) -> None:
    click.echo(to_json(content))


def print_labellers(summaries: list[dict[str, Any]]) -> None:
    if not summaries:
        click.echo("no labels yet; `neuroscope labels import` takes some over.", err=True)
        return
    columns = (
        "labeller",
        "labels",
        "scored",
        "unreliable",
        "mean score",
        "method",
        "model",
        "newest",
    )
    rows = []
    for one in summaries:
        mean = one["mean_score"]
        rows.append(
            (
                one["labeller"],
                f"{one['labels']:,}",
                f"{one['scored']:,}",
                f"{one['unreliable']:,}",
                "" if mean is None else f"{mean:.2f}",
                ", ".join(one["methods"]),
                ", ".join(one["models"]),
                one["newest"],
            )
        )
    _print_table(columns, rows)


def print_labels(labels: list[Label], if_none: str) -> None:
    if not labels:
        click.echo(if_none, err=True)
        return
    columns = ("index", "label", "labeller", "score", "method", "model", "created", "examples")
    _print_table(
        columns,
        (
            (
                str(label.index),
                label.text,
                label.labeller,
                _score(label),
                label.method,
                label.model,
                label.created,
                None if label.examples is None else str(label.examples),
            )
            for label in labels
        ),
    )


def fetch_with_progress(identifier: str) -> list[Path]:
    """Raises what `fetch_explanations` does."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"Fetching {identifier}", total=None)
        return fetch_explanations(
            identifier, lambda done, total: bar.update(task, completed=done, total=total)
        )


def _score(label: Label) -> str:
    if label.score is None:
        return "unscored"
    return f"{label.score:.2f}" + (" unreliable" if label.unreliable else "")


def _print_table(columns: tuple[str, ...], rows: Iterable[tuple[str | None, ...]]) -> None:
    """Columns that are empty in every row are left out."""
    rows = list(rows)
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table(box=None, pad_edge=False)
    for i in used:
        table.add_column(
            columns[i], overflow="fold", min_width=32 if columns[i] == "label" else None
        )
    for row in rows:
        # As Text: labels may look like rich's markup.
        table.add_row(*(Text(row[i] or "") for i in used))
    Console().print(table)
