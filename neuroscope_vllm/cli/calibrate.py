"""`neuroscope calibrate`: what each feature does on ordinary text."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.engines import engine_flags, open_engine, writable
from neuroscope_vllm.cli.supervise import console
from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.errors import NeuroscopeError

if TYPE_CHECKING:
    from neuroscope_vllm.core.calibration import Calibration
    from neuroscope_vllm.core.corpus import Corpus
    from neuroscope_vllm.engine.calibrate import Checkpoint
    from neuroscope_vllm.engine.protocol import Engine

FEW_TOKENS = 10_000

HELP = """Measure how often and how strongly each feature fires on ordinary text.

Runs a corpus through the model, by default 1,000 samples of WikiText-103, and writes one
calibration for each SAE. Rankings (`zscore`, `tail`, `quantile`) need it, and attention sinks are
recognised by it. A server finds it by itself. Special tokens and sinks are left out.

A run that was stopped, or killed, goes on where it was when the same command is given again, and
ends with the same result.

CORPUS is a .txt (paragraphs), .jsonl or .parquet file, a folder of them, or a dataset of the
Hugging Face hub, with a column `text`, `messages` (chats) or `token_ids`.
"""


@click.command("calibrate", help=HELP, epilog="Everything after -- goes to vLLM untouched.")
@engine_flags
@click.option("--corpus", "source", help="Text to read (Salesforce/wikitext).", metavar="CORPUS")
@click.option("--subset", help="Configuration of a hub dataset (wikitext-103-raw-v1).")
@click.option("--split", default="train", show_default=True, help="Split of a hub dataset.")
@click.option("--revision", help="Commit, tag or branch of a hub dataset.")
@click.option("--column", help="Column to read (token_ids, messages or text, as there is).")
@click.option("--samples", default=1000, show_default=True, type=click.IntRange(1))
@click.option(
    "--max-tokens",
    default=256,
    show_default=True,
    type=click.IntRange(16),
    help="Longest sample; longer rows give several.",
)
@click.option("--output", type=click.Path(path_type=Path), help="File to write, of one SAE.")
@click.option("--restart", is_flag=True, help="Begin anew, whatever a stopped run left.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(
    source: str | None,
    output: Path | None,
    restart: bool,
    as_json: bool,
    max_tokens: int,
    subset: str | None,
    split: str,
    revision: str | None,
    column: str | None,
    samples: int,
    **engine_options: Any,
) -> None:
    from neuroscope_vllm.core.corpus import WIKITEXT, Corpus, check

    corpus = Corpus(
        source=source or WIKITEXT,
        subset=subset,
        split=split,
        column=column,
        revision=revision,
        samples=samples,
        max_tokens=max_tokens,
    )
    try:
        check(corpus)
        engine = open_engine(max_tokens=max_tokens, **engine_options)
        with contextlib.closing(engine):
            found = _run(engine, corpus, output, restart)
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(
            f"{error.filename or 'the result'} can not be written ({error.strerror}); what is done"
            " is kept, so mend that and give the same command again."
        ) from None
    except KeyboardInterrupt:
        console.print("neuroscope: stopped; give the same command again to go on")
        raise click.exceptions.Exit(130) from None
    if as_json:
        click.echo(json.dumps(found))
    else:
        _print_table(found)


def _run(
    engine: Engine, corpus: Corpus, output: Path | None, restart: bool
) -> list[dict[str, Any]]:
    from neuroscope_vllm.engine.calibrate import calibrate

    if output is not None and len(engine.sites) > 1:
        raise click.UsageError("--output names one file, but there are several SAEs; leave it out.")
    name = artefacts.calibration_name(engine.sae_input)
    paths = {
        layer: writable(output or artefacts.home(info.source) / name)
        for layer, info in engine.sites.items()
    }
    first = next(iter(paths.values()))
    checkpoint = first.with_name(first.name + ".checkpoint")
    with contextlib.ExitStack() as guards:
        for path in paths.values():
            guards.enter_context(artefacts.only_writer(path))
        with _progress(corpus.samples) as report:
            total, done = calibrate(engine, corpus, checkpoint, restart=restart, on_progress=report)
        for layer, calibration in total.items():
            _save(calibration, paths[layer])
        checkpoint.unlink()
    if done.sequences < corpus.samples:
        console.print(
            f"neuroscope: {corpus.source} gave {done.sequences} samples of {corpus.samples}"
        )
    return [
        _summary(layer, calibration, done, paths[layer]) for layer, calibration in total.items()
    ]


def _save(calibration: Calibration, path: Path) -> None:
    if old := artefacts.keep_old(path, calibration.to_bytes()):
        console.print(f"neuroscope: kept what was there as {old}")
    if calibration.tokens < FEW_TOKENS:
        console.print(
            f"neuroscope: {calibration.tokens:,} tokens are few: features that fire on fewer than"
            f" one in {max(calibration.tokens // 10, 1):,} are hardly known"
        )
    calibration.save(path)


@contextlib.contextmanager
def _progress(samples: int) -> Any:
    """A bar with tokens/s and the time left; yields what to call with each checkpoint."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("samples"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began: list[tuple[float, int]] = []
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=samples, rate="")

        def report(done: Checkpoint) -> None:
            now = bar.get_time()
            if not began:
                began.append((now, done.tokens))
            since, before = began[0]
            rate = f"{(done.tokens - before) / (now - since):,.0f} tokens/s" if now > since else ""
            bar.update(task, completed=done.sequences, rate=rate)

        yield report


def _summary(layer: int, calibration: Calibration, done: Checkpoint, path: Path) -> dict[str, Any]:
    frequency = calibration.frequency
    rebuilt = calibration.reconstruction
    assert rebuilt is not None
    return {
        "layer": layer,
        "sae": calibration.sae,
        "model": calibration.model,
        "corpus": calibration.corpus,
        "samples": done.sequences,
        "tokens": calibration.tokens,
        "sinks": calibration.sinks,
        "sink_norm": calibration.sink_norm,
        "median_norm": calibration.median_norm,
        "l0": calibration.l0,
        "explained_variance": rebuilt.explained_variance,
        "features": calibration.width,
        "silent_features": int((frequency == 0).sum()),
        "dense_features": len(calibration.dense),
        "path": str(path),
    }


def _print_table(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="calibrated")
    table.add_column()
    for _ in found:
        table.add_column(overflow="fold")
    for name in found[0]:
        shown = (
            f"{v:,.4g}"
            if isinstance(v := one[name], float)
            else f"{v:,}"
            if isinstance(v, int)
            else v
            for one in found
        )
        table.add_row(name.replace("_", " "), *shown)
    Console().print(table)
