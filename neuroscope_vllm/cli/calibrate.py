"""`neuroscope calibrate`: what each feature does on ordinary text."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.corpus_options import (
    CORPUS_HELP,
    corpus_flags,
    print_results,
    take_corpus,
)
from neuroscope_vllm.cli.engines import engine_flags, open_engine, writable
from neuroscope_vllm.cli.failures import in_a_sentence
from neuroscope_vllm.cli.progress import progress
from neuroscope_vllm.cli.supervise import console
from neuroscope_vllm.core import artefacts

if TYPE_CHECKING:
    from neuroscope_vllm.core.calibration import Calibration
    from neuroscope_vllm.core.corpus import Corpus
    from neuroscope_vllm.engine.calibrate import Checkpoint
    from neuroscope_vllm.engine.protocol import Engine

FEW_TOKENS = 10_000

HELP = f"""Measure how often and how strongly each feature fires on ordinary text.

Runs a corpus through the model, by default 1,000 samples of WikiText-103, and writes one
calibration for each SAE. Rankings (`zscore`, `tail`, `quantile`) need it, and attention sinks are
recognised by it. A server finds it by itself. Special tokens and sinks are left out.

A run that was stopped, or killed, goes on where it was when the same command is given again, and
ends with the same result.

{CORPUS_HELP}
"""


@click.command("calibrate", help=HELP, epilog="Everything after -- goes to vLLM untouched.")
@engine_flags
@corpus_flags(samples=1000)
@click.option("--output", type=click.Path(path_type=Path), help="File to write, of one SAE.")
@click.option("--restart", is_flag=True, help="Begin anew, whatever a stopped run left.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(output: Path | None, restart: bool, as_json: bool, **options: Any) -> None:
    with in_a_sentence():
        corpus = take_corpus(options)
        engine = open_engine(max_tokens=corpus.max_tokens, **options)
        with contextlib.closing(engine):
            found = _run(engine, corpus, output, restart)
    print_results(found, "calibrated", as_json)


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
        with progress(corpus.samples) as report:
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
