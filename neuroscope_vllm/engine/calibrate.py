"""Calibration of every observed layer of an engine, on a corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from neuroscope_vllm.core.artefacts import write_whole
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.corpus import Corpus
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.passes import CalibrationPass
from neuroscope_vllm.engine.corpus_run import Done, describe, run_corpus, saes, today
from neuroscope_vllm.engine.protocol import Engine


class Checkpoint(Done, kw_only=True):
    """What is done of a run, as msgpack in one file.

    Attributes:
        layers: Calibrations so far (`Calibration.to_bytes`).
    """

    layers: dict[int, bytes] = msgspec.field(default_factory=dict)


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
    done, total = _resumed(checkpoint, describe(engine, corpus), restart)
    on_progress(done)
    for _, results in run_corpus(
        engine, corpus, done, lambda: _pass(engine, corpus, done), checkpoint
    ):
        for layer, result in results.items():
            part = CalibrationPass.read(result)
            before = total.get(layer)
            if before is not None and before.sae_digest != part.sae_digest:
                raise ConfigError(
                    f"{checkpoint} was begun with other weights than SAE {part.sae} has now; begin"
                    " anew with --restart."
                )
            total[layer] = before.merge(part) if before else part
        done.layers = {layer: part.to_bytes() for layer, part in total.items()}
        write_whole(checkpoint, msgspec.msgpack.encode(done))
        on_progress(done)
    if not any(calibration.tokens for calibration in total.values()):
        raise ConfigError(
            f"corpus {corpus.source} gave no sample of at least {corpus.min_tokens} tokens; give"
            " one with running text."
        )
    return total, done


def _pass(engine: Engine, corpus: Corpus, done: Done) -> CalibrationPass:
    return CalibrationPass(
        special_ids=sorted(engine.tokenizer.all_special_ids),
        sink_norm=done.sink_norm,
        sae=saes(engine),
        sae_input=engine.sae_input,
        model=engine.model,
        corpus=corpus.describe(),
        created=done.created,
    )


def _resumed(path: Path, run: str, restart: bool) -> tuple[Checkpoint, dict[int, Calibration]]:
    """What is done, and the calibrations in it."""
    if restart or not path.exists():
        return Checkpoint(run=run, created=today()), {}
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
