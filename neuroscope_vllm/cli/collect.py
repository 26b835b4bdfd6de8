"""`neuroscope collect`: where each feature fires in a corpus."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.corpus_options import (
    CORPUS_HELP,
    corpus_flags,
    print_results,
    take_corpus,
)
from neuroscope_vllm.cli.engines import engine_flags, open_engine
from neuroscope_vllm.cli.failures import in_a_sentence
from neuroscope_vllm.cli.progress import progress
from neuroscope_vllm.cli.supervise import console
from neuroscope_vllm.core import artefacts

if TYPE_CHECKING:
    from neuroscope_vllm.core.corpus import Corpus
    from neuroscope_vllm.engine.collect import Collected, Wanted
    from neuroscope_vllm.engine.protocol import Engine

HELP = f"""Collect examples of every feature: what `label` and `score` read.

Runs a corpus through the model, by default 5,000 samples of WikiText-103, and writes a folder with
three parquet files for each SAE:

\b
examples.parquet  of each feature its strongest tokens (kind `top`) and a
                  uniform sample of all it fires on (`sample`), each in its
                  context, with the feature's activations there. Of tokens
                  with the same text before them one is kept. `held_out`
                  ones, half of the samples, are not shown to labellers.
features.parquet  of each feature how often it fires, its largest activation,
                  and the features that often fire on the same tokens
                  (`partners`); `together`, on how many, is a lower bound.
contexts.parquet  stretches of held-out text with all that fires in them.

Special tokens and attention sinks are in contexts, but nothing fires on them. The calibration, if
there is one, says what a sink is.

A run that was stopped, or killed, goes on where it was when the same command is given again, and
ends with the same result. Examples that are there are replaced once the new ones are complete.

{CORPUS_HELP}
"""
FEW_TOKENS = 100_000


@click.command("collect", help=HELP, epilog="Everything after -- goes to vLLM untouched.")
@engine_flags
@corpus_flags(samples=5000)
@click.option(
    "--before",
    default=24,
    show_default=True,
    type=click.IntRange(0, 1024),
    metavar="N",
    help="Tokens of context before an example's own.",
)
@click.option(
    "--after",
    default=8,
    show_default=True,
    type=click.IntRange(0, 1024),
    metavar="N",
    help="Tokens of context after it.",
)
@click.option(
    "--top",
    default=20,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Strongest tokens of each feature.",
)
@click.option(
    "--sample",
    default=60,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="Other tokens of each feature, a uniform sample.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write, of one SAE.")
@click.option("--restart", is_flag=True, help="Begin anew, whatever a stopped run left.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def command(
    before: int,
    after: int,
    top: int,
    sample: int,
    output: Path | None,
    restart: bool,
    as_json: bool,
    **options: Any,
) -> None:
    with in_a_sentence():
        corpus = take_corpus(options)
        if output is not None:
            _replaceable(output)
        engine = open_engine(max_tokens=corpus.max_tokens, **options)

        from neuroscope_vllm.engine.collect import Wanted

        wanted = Wanted(before=before, after=after, top=top, sample=sample)
        with contextlib.closing(engine):
            found = _run(engine, corpus, wanted, output, restart)
    print_results(found, "collected", as_json)


def _run(
    engine: Engine, corpus: Corpus, wanted: Wanted, output: Path | None, restart: bool
) -> list[dict[str, Any]]:
    from neuroscope_vllm.engine.collect import collect, write

    if output is not None and len(engine.sites) > 1:
        raise click.UsageError(
            "--output names one folder, but there are several SAEs; leave it out."
        )
    name = artefacts.examples_name(engine.sae_input)
    folders = {
        layer: _replaceable(output or artefacts.home(info.source) / name)
        for layer, info in engine.sites.items()
    }
    first = next(iter(folders.values()))
    with contextlib.ExitStack() as guards:
        for folder in folders.values():
            guards.enter_context(artefacts.only_writer(folder))
        with progress(corpus.samples) as report:
            found, checkpoint = collect(
                engine,
                corpus,
                wanted,
                first.with_name(first.name + ".checkpoint"),
                restart=restart,
                on_progress=report,
            )
        began = time.monotonic()
        with console.status("writing the examples"):
            write(engine, corpus, wanted, found, folders, lambda ids: _texts(engine, ids))
            checkpoint.remove()
        seconds = time.monotonic() - began
    if found.done.sequences < corpus.samples:
        console.print(
            f"neuroscope: {corpus.source} gave {found.done.sequences} samples of {corpus.samples}"
        )
    return [_summary(layer, found, corpus, folders[layer], seconds) for layer in found.layers]


def _replaceable(folder: Path) -> Path:
    """`folder`, if examples may be written there. Raises click.ClickException."""
    from neuroscope_vllm.core.examples.store import SCHEMAS

    ours = {f"{name}.parquet" for name in SCHEMAS}
    if folder.exists() and not folder.is_dir():
        raise click.ClickException(f"{folder} is a file; name a folder with --output.")
    if folder.is_dir() and {path.name for path in folder.iterdir()} - ours:
        raise click.ClickException(
            f"{folder} holds other things than examples; name a new folder with --output."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(
            f"{folder.parent} can not be made ({error.strerror}); name another with --output."
        ) from None
    return folder


def _texts(engine: Engine, ids: list[int]) -> list[str]:
    """Of each token of a sequence; joined, the sequence's."""
    from neuroscope_vllm.core.detokenize import TextStream

    # None of a tokenizer that is not one of the tokenizers library: text is then shown by id.
    fast = getattr(engine.tokenizer, "backend_tokenizer", None)
    stream = TextStream(fast, [], skip_special_tokens=False)
    return [stream.step(token_id) for token_id in ids]


def _summary(
    layer: int, found: Collected, corpus: Corpus, folder: Path, seconds: float
) -> dict[str, Any]:
    merged = found.layers[layer]
    if merged.tokens < FEW_TOKENS:
        console.print(
            f"neuroscope: {merged.tokens:,} tokens are few: features that fire on fewer than one in"
            f" {max(merged.tokens // 20, 1):,} have not even 20 examples"
        )
    choice = merged.examples.kept()[1]
    silent = int((merged.firings == 0).sum())
    alive = merged.width - silent
    sink_norm = found.done.sink_norm[layer]
    return {
        "layer": layer,
        "corpus": corpus.describe(),
        "samples": found.done.sequences,
        "tokens": merged.tokens,
        "features": merged.width,
        "features_with_examples": alive,
        "silent_features": silent,
        "mean_examples": sum(map(len, choice)) / max(alive, 1),
        "contexts": len(merged.contexts.kept()[0].ident),
        "sink_norm": sink_norm if math.isfinite(sink_norm) else None,
        "tokens_per_second": found.rate,
        "seconds_to_write": seconds,
        "peak_memory_mib": _peak_memory() / 2**20,
        "size_mib": sum(path.stat().st_size for path in folder.iterdir()) / 2**20,
        "path": str(folder),
    }


def _peak_memory() -> int:
    """Bytes, of this process and its largest child."""
    unit = 1 if sys.platform == "darwin" else 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * sum(resource.getrusage(one).ru_maxrss for one in who)
