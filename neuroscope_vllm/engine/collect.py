"""Examples of every feature of every observed layer of an engine, from a corpus."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.corpus import Corpus
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.examples import Collection, write_examples
from neuroscope_vllm.core.examples.merge import Merged
from neuroscope_vllm.core.examples.tables import Texts, batches
from neuroscope_vllm.core.passes import ExamplesPass
from neuroscope_vllm.core.sae.observed import calibration_of
from neuroscope_vllm.engine.collect_checkpoint import CollectCheckpoint, Stored
from neuroscope_vllm.engine.corpus_run import Done, describe, run_corpus, saes
from neuroscope_vllm.engine.protocol import Engine


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What to keep of each feature; see `Collection`."""

    before: int = 24
    after: int = 8
    top: int = 20
    sample: int = 60


class Collected(msgspec.Struct, kw_only=True):
    """
    Attributes:
        done: Of the corpus.
        layers: What is kept, by layer.
        sequences: The corpus, int32 each.
        rate: Tokens a second of this process's part of the run; None: all was done before.
    """

    done: Done
    layers: dict[int, Merged] = {}
    sequences: list[NDArray[np.int32]] = []
    rate: float | None = None


def collect(
    engine: Engine,
    corpus: Corpus,
    wanted: Wanted,
    folder: Path,
    *,
    restart: bool = False,
    on_progress: Callable[[Done], object] = lambda done: None,
) -> tuple[Collected, CollectCheckpoint]:
    """Collect examples of every observed layer of `engine` from `corpus`.

    Args:
        folder: The checkpoint, where what is done is kept; the run goes on from what is there. The
            caller removes it once the examples are written.
        restart: Begin anew whatever is there.
        on_progress: Called after each chunk, and once with what the checkpoint held.

    Raises:
        ConfigError: The corpus can not be read or gives no samples, the checkpoint is another run's
            or of another corpus, or a calibration or the checkpoint is of other weights.
        EngineError: The engine failed.
    """
    calibrations = known_calibrations(engine)
    checkpoint = CollectCheckpoint(folder, f"{describe(engine, corpus)}, {wanted}", restart)
    done = checkpoint.done
    found = Collected(done=done)
    for stored in checkpoint.chunks():
        try:
            add(found, stored, wanted, folder)
        except (SafetensorError, KeyError) as error:
            raise checkpoint.unreadable(error) from error
    on_progress(done)
    cuts = {layer: calibration.sink_norm for layer, (_, calibration) in calibrations.items()}
    if not done.chunks and len(cuts) == len(engine.sites):
        done.sink_norm = cuts
    before, began = done.tokens, 0.0

    def what() -> ExamplesPass:
        nonlocal began
        began = began or time.monotonic()
        if not done.chunks:
            done.sink_norm |= cuts
        return next_pass(engine, wanted, found)

    for chunk, results in run_corpus(engine, corpus, done, what, folder):
        stored = Stored.of(chunk, results)
        add(found, stored, wanted, folder)
        _check(calibrations, found)
        checkpoint.append(stored)
        on_progress(done)
    if not any(merged.tokens for merged in found.layers.values()):
        raise ConfigError(
            f"corpus {corpus.source} gave no sample of at least {corpus.min_tokens} tokens; give"
            " one with running text."
        )
    if began:
        found.rate = (done.tokens - before) / (time.monotonic() - began)
    return found, checkpoint


def write(
    engine: Engine,
    corpus: Corpus,
    wanted: Wanted,
    found: Collected,
    folders: Mapping[int, Path],
    texts: Callable[[list[int]], list[str]],
) -> None:
    """Write what was found of each layer to its folder.

    Args:
        texts: Of the tokens of a sequence, which joined are its text.
    """
    decoded = (texts(sequence.tolist()) for sequence in found.sequences)
    all_texts = Texts(found.sequences, decoded)
    for layer, merged in found.layers.items():
        sink_norm = found.done.sink_norm[layer]
        collection = Collection(
            sae=saes(engine)[layer],
            sae_digest=merged.sae_digest,
            sae_input=engine.sae_input,
            layer=layer,
            model=engine.model,
            corpus=corpus.describe(),
            created=found.done.created,
            width=merged.width,
            samples=found.done.sequences,
            tokens=merged.tokens,
            sink_norm=sink_norm if math.isfinite(sink_norm) else None,
            **msgspec.structs.asdict(wanted),
        )
        tables = batches(merged, all_texts, wanted.before, wanted.after)
        write_examples(folders[layer], collection, tables)


def add(found: Collected, stored: Stored, wanted: Wanted, folder: Path) -> None:
    """Add the chunk after those that are in `found`.

    Raises:
        ConfigError: It was encoded with other weights; `folder` names the run.
    """
    first = len(found.sequences)
    found.sequences += stored.token_ids
    for layer, result in stored.layers.items():
        part = ExamplesPass.read(result)
        merged = found.layers.setdefault(layer, Merged(part, wanted.top, wanted.sample))
        if merged.sae_digest != part.sae_digest:
            raise ConfigError(
                f"{folder} was begun with other weights than the SAE of layer {layer} has now;"
                " begin anew with --restart."
            )
        merged.add(part, first)


def next_pass(engine: Engine, wanted: Wanted, found: Collected) -> ExamplesPass:
    """The pass of the chunk after those that are in `found`."""
    return ExamplesPass(
        special_ids=sorted(engine.tokenizer.all_special_ids),
        sink_norm=found.done.sink_norm,
        floors={layer: merged.floors() for layer, merged in found.layers.items()},
        **msgspec.structs.asdict(wanted),
    )


def known_calibrations(engine: Engine) -> dict[int, tuple[Path, Calibration]]:
    """Of those SAEs that have one."""
    found = {}
    for layer, info in engine.sites.items():
        given = {"sae": [info.source], "layer": [layer], "sae_input": engine.sae_input}
        settings = msgspec.convert(given, Settings)
        found[layer] = calibration_of(settings, 0, info)
    return {layer: one for layer, one in found.items() if one is not None}


def _check(calibrations: dict[int, tuple[Path, Calibration]], found: Collected) -> None:
    """Raises ConfigError: A calibration is of other weights."""
    for layer, (path, calibration) in calibrations.items():
        if calibration.sae_digest not in ("", found.layers[layer].sae_digest):
            raise ConfigError(
                f"calibration {path} was made with other weights than the SAE of layer {layer} has"
                " now; calibrate again with `neuroscope calibrate`, or delete it."
            )
