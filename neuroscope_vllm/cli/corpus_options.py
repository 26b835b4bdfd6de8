"""Options of the commands that run a corpus, and how they print what they found."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from neuroscope_vllm.core.corpus import Corpus

CORPUS_HELP = """CORPUS is a .txt (paragraphs), .jsonl or .parquet file, a folder of them, or a
dataset of the Hugging Face hub, with a column `text`, `messages` (chats) or `token_ids`."""


def corpus_flags(samples: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that `take_corpus` reads; so many samples by default."""
    flags = [
        click.option("--corpus", "source", help="Text to read (Salesforce/wikitext).",
                     metavar="CORPUS"),
        click.option("--subset", help="Configuration of a hub dataset (wikitext-103-raw-v1)."),
        click.option("--split", default="train", show_default=True,
                     help="Split of a hub dataset."),
        click.option("--revision", help="Commit, tag or branch of a hub dataset."),
        click.option("--column", help="Column to read (token_ids, messages or text, as there is)."),
        click.option("--samples", default=samples, show_default=True, type=click.IntRange(1)),
        click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(16),
                     help="Longest sample; longer rows give several."),
    ]  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return add


def take_corpus(options: dict[str, Any]) -> Corpus:
    """The corpus that the options name, which are taken out of them.

    Raises ConfigError: It does not exist.
    """
    from neuroscope_vllm.core.corpus import WIKITEXT, Corpus, check

    names = ("source", "subset", "split", "column", "revision", "samples", "max_tokens")
    given = {name: options.pop(name) for name in names}
    corpus = Corpus(**{**given, "source": given["source"] or WIKITEXT})
    check(corpus)
    return corpus


def print_results(found: list[dict[str, Any]], title: str, as_json: bool) -> None:
    """One record a layer, as JSON or as columns of a table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table(show_header=False, title=title)
    table.add_column()
    for _ in found:
        table.add_column(overflow="fold")
    for name in found[0]:
        shown = (
            f"{v:,.4g}"
            if isinstance(v := one[name], float)
            else f"{v:,}"
            if isinstance(v, int)
            else str(v or "")
            for one in found
        )
        table.add_row(name.replace("_", " "), *shown)
    Console().print(table)
