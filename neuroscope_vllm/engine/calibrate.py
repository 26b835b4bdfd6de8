"""A corpus through an engine, chunk by chunk, into one calibration a layer.

A chunk is the unit of work: its sequences always run together, and chunks are added in the order of
the corpus, each with a checkpoint. So a run that was killed and resumed ends with the same bits as
one that was not.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import msgspec

from neuroscope_vllm.core.artefacts import pinned, write_whole
from neuroscope_vllm.core.calibration import SINK_MULTIPLE, Calibration
from neuroscope_vllm.core.corpus import Corpus, digest, samples
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.passes import CalibrationPass
from neuroscope_vllm.engine.protocol import Engine

CHUNK = 64
"""Sequences a chunk."""


class Checkpoint(msgspec.Struct, kw_only=True):
    """What is done of a run, as msgpack in one file.

    Attributes:
        run: What is being calibrated on what; another run's checkpoint is refused.
        created: ISO date of the start.
        chunks, sequences, tokens: Done so far, special tokens included.
        corpus: Digest of the sequences so far.
        sink_norm: The cut of each layer.
        layers: Calibrations so far (`Calibration.to_bytes`).
    """

    run: str
    created: str
    chunks: int = 0
    sequences: int = 0
    tokens: int = 0
    corpus: str = ""
    sink_norm: dict[int, float] = {}
    layers: dict[int, bytes] = {}


def calibrate(
    engine: Engine,
    corpus: Corpus,
    checkpoint: Path,
    *,
    restart: bool = False,
    on_progress: Callable[[Checkpoint], object] = lambda done: None,
) -> tuple[dict[int, Calibration], Checkpoint]:
    """Calibrate every observed layer of `engine` on `corpus`.

    Args:
        checkpoint: Where to keep what is done; the run goes on from what is there. The caller
            removes it once the calibrations are saved.
        restart: Begin anew whatever is there.
        on_progress: Called after each chunk, and once with what a checkpoint held.

    Raises:
        ConfigError: The corpus can not be read or gives no samples, or the checkpoint is another
            run's or of another corpus.
        EngineError: The engine failed.
    """
    done, total = _resumed(checkpoint, _describe(engine, corpus), restart)
    on_progress(done)
    seen = ""
    chunks = _chunks(corpus, engine)
    for chunk in islice(chunks, done.chunks):
        seen = digest(chunk, seen)
    if seen != done.corpus:
        raise ConfigError(
            f"{checkpoint} was begun on other text than {corpus.source} now holds; begin anew with"
            " --restart."
        )
    for chunk in chunks:
        seen = digest(chunk, seen)
        if not done.sink_norm:
            done.sink_norm = _sink_norms(engine, corpus, chunk)
        results = engine.run(_pass(engine, corpus, done), chunk)
        for layer, result in results.items():
            part = CalibrationPass.read(result)
            before = total.get(layer)
            if before is not None and before.sae_digest != part.sae_digest:
                raise ConfigError(
                    f"{checkpoint} was begun with other weights than SAE {part.sae} has now; begin"
                    " anew with --restart."
                )
            total[layer] = before.merge(part) if before else part
        done.chunks += 1
        done.sequences += len(chunk)
        done.tokens += sum(map(len, chunk))
        done.corpus = seen
        done.layers = {layer: part.to_bytes() for layer, part in total.items()}
        write_whole(checkpoint, msgspec.msgpack.encode(done))
        on_progress(done)
    if not any(calibration.tokens for calibration in total.values()):
        raise ConfigError(
            f"corpus {corpus.source} gave no sample of at least {corpus.min_tokens} tokens; give"
            " one with running text."
        )
    return total, done


def _chunks(corpus: Corpus, engine: Engine) -> Iterator[list[list[int]]]:
    sequences = samples(corpus, engine.tokenizer)
    while chunk := list(islice(sequences, CHUNK)):
        yield chunk


def _sink_norms(engine: Engine, corpus: Corpus, chunk: list[list[int]]) -> dict[int, float]:
    """The cut of each layer, from the norms of the first chunk, sinks and all."""
    results = engine.run(_pass(engine, corpus, None), chunk)
    return {
        layer: SINK_MULTIPLE * CalibrationPass.read(result).median_norm or float("inf")
        for layer, result in results.items()
    }


def _pass(engine: Engine, corpus: Corpus, done: Checkpoint | None) -> CalibrationPass:
    return CalibrationPass(
        special_ids=sorted(engine.tokenizer.all_special_ids),
        sink_norm=done.sink_norm if done else {},
        sae=_saes(engine),
        sae_input=engine.sae_input,
        model=engine.model,
        corpus=corpus.describe(),
        created=done.created if done else "",
    )


def _saes(engine: Engine) -> dict[int, str]:
    return {layer: pinned(info.source, info.revision) for layer, info in engine.sites.items()}


def _describe(engine: Engine, corpus: Corpus) -> str:
    return f"{engine.model}, {engine.identity}, {engine.sae_input}, {_saes(engine)}, {corpus}"


def _resumed(path: Path, run: str, restart: bool) -> tuple[Checkpoint, dict[int, Calibration]]:
    """What is done, and the calibrations in it."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    if restart or not path.exists():
        return Checkpoint(run=run, created=today), {}
    try:
        found = msgspec.msgpack.decode(path.read_bytes(), type=Checkpoint)
        layers = {layer: Calibration.from_bytes(data) for layer, data in found.layers.items()}
    except (msgspec.DecodeError, ConfigError, OSError) as error:
        raise ConfigError(
            f"checkpoint {path} can not be read ({error}); begin anew with --restart."
        ) from error
    if found.run != run:
        raise ConfigError(
            f"checkpoint {path} is of another run ({found.run}); finish that one, or begin this"
            " one anew with --restart."
        )
    return found, layers
