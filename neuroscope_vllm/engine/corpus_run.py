"""A corpus through an engine, chunk by chunk, so that a run can be stopped and gone on with.

A chunk is the unit of work: its sequences always run together, and results come in the order of the
corpus, whoever ran them. So a run that was killed and resumed, or was spread over many engines,
ends with the same bits as one that was not.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

import msgspec

from neuroscope_vllm.core.artefacts import pinned
from neuroscope_vllm.core.calibration import SINK_MULTIPLE
from neuroscope_vllm.core.corpus import Corpus, digest, samples
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.passes import CalibrationPass, Pass
from neuroscope_vllm.engine.protocol import Chunk, Engine

CHUNK = 50
"""Sequences a chunk."""


class Done(msgspec.Struct, kw_only=True):
    """How far a run is: what its checkpoints begin with.

    Attributes:
        run: What is gathered from what; another run's checkpoint is refused.
        created: ISO date of the start.
        chunks, sequences, tokens: Done so far, special tokens included.
        corpus: Digest of the sequences so far.
        sink_norm: The cut of each layer.
    """

    run: str
    created: str
    chunks: int = 0
    sequences: int = 0
    tokens: int = 0
    corpus: str = ""
    sink_norm: dict[int, float] = {}


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def describe(engine: Engine, corpus: Corpus) -> str:
    """All that decides a run's numbers."""
    return f"{engine.model}, {engine.identity}, {engine.sae_input}, {saes(engine)}, {corpus}"


def saes(engine: Engine) -> dict[int, str]:
    """The SAE of each layer, a hub's at its commit."""
    return {layer: pinned(info.source, info.revision) for layer, info in engine.sites.items()}


def run_corpus(
    engine: Engine,
    corpus: Corpus,
    done: Done,
    what: Callable[[], Pass],
    checkpoint: Path,
) -> Iterator[tuple[Chunk, dict[int, bytes]]]:
    """Run what is left of `corpus`.

    Args:
        done: How far it is. Brought up to date before each chunk is given out, and given its sink
            cuts before `what` is called first.
        what: Makes the pass of a chunk that is about to run; what it depends on beyond `done`'s
            cuts must not change the end result.
        checkpoint: Where `done` is from, for messages.

    Yields:
        Each chunk's sequences, and the result of each layer, in the order of the corpus.

    Raises:
        ConfigError: The corpus can not be read, or is not the one that was begun on.
        EngineError: The engine failed.
    """
    seen = ""
    chunks = _chunks(corpus, engine)
    for chunk in islice(chunks, done.chunks):
        seen = digest(chunk, seen)
    if seen != done.corpus:
        raise ConfigError(
            f"{checkpoint} was begun on other text than {corpus.source} now holds; begin anew with"
            " --restart."
        )
    first = next(chunks, None)
    if first is None:
        return
    if not done.sink_norm:
        done.sink_norm = _sink_norms(engine, first)
    pending: deque[Chunk] = deque()

    def given_out() -> Iterator[Chunk]:
        for chunk in chain([first], chunks):
            pending.append(chunk)
            yield chunk

    for results in engine.run_each(what, given_out()):
        chunk = pending.popleft()
        seen = digest(chunk, seen)
        done.chunks += 1
        done.sequences += len(chunk)
        done.tokens += sum(map(len, chunk))
        done.corpus = seen
        yield chunk, results


def _chunks(corpus: Corpus, engine: Engine) -> Iterator[Chunk]:
    sequences = samples(corpus, engine.tokenizer)
    while chunk := list(islice(sequences, CHUNK)):
        yield chunk


def _sink_norms(engine: Engine, chunk: Chunk) -> dict[int, float]:
    """The cut of each layer, from the norms of the first chunk, sinks and all."""
    norms = CalibrationPass(special_ids=sorted(engine.tokenizer.all_special_ids))
    return {
        layer: SINK_MULTIPLE * CalibrationPass.read(result).median_norm or float("inf")
        for layer, result in engine.run(norms, chunk).items()
    }
