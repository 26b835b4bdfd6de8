"""What is done of a `collect`, in a folder: `run`, which says how far it is, and a file a chunk.

A chunk's file is there before `run` counts it, so whenever a run is killed, what `run` counts is
whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neuroscope_vllm.core.artefacts import write_whole
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.engine.corpus_run import Done, today
from neuroscope_vllm.engine.protocol import Chunk

_SIZE_BYTES = 8  # in front of each file, as zstd's blocks do not tell it


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk as it was done.

    Attributes:
        sequences: int32 token ids of each, as bytes.
        layers: The result of each layer, as it was gathered.
    """

    sequences: list[bytes]
    layers: dict[int, bytes]

    @classmethod
    def of(cls, chunk: Chunk, layers: dict[int, bytes]) -> Stored:
        return cls(sequences=[np.array(s, "<i4").tobytes() for s in chunk], layers=layers)

    @property
    def token_ids(self) -> list[NDArray[np.int32]]:
        return [np.frombuffer(sequence, "<i4") for sequence in self.sequences]


class CollectCheckpoint:
    """One run's.

    Attributes:
        done: How far it is.
    """

    def __init__(self, folder: Path, run: str, restart: bool) -> None:
        """
        Args:
            folder: Where to keep it; what is there is taken up.
            run: What is gathered from what.
            restart: Begin anew whatever is there.

        Raises:
            ConfigError: What is there is another run's, or can not be read.
        """
        self._folder, self._head = folder, folder / "run"
        if restart:
            self.remove()
        self.done = self._found(run) or Done(run=run, created=today())

    def append(self, stored: Stored) -> None:
        """Add the chunk that `done` now counts."""
        data = msgspec.msgpack.encode(stored)
        size = len(data).to_bytes(_SIZE_BYTES, "little")
        packed = pa.Codec("zstd").compress(data, asbytes=True)
        write_whole(self._file(self.done.chunks - 1), size + packed)
        write_whole(self._head, msgspec.msgpack.encode(self.done))

    def chunks(self) -> Iterator[Stored]:
        """What is done. Raises ConfigError: It can not be read."""
        for number in range(self.done.chunks):
            try:
                data = self._file(number).read_bytes()
                size = int.from_bytes(data[:_SIZE_BYTES], "little")
                whole = pa.Codec("zstd").decompress(data[_SIZE_BYTES:], size, asbytes=True)
                yield msgspec.msgpack.decode(whole, type=Stored)
            except (msgspec.DecodeError, OSError, ValueError) as error:
                raise self.unreadable(error) from error

    def unreadable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"checkpoint {self._folder} can not be read ({error}); begin anew with --restart."
        )

    def remove(self) -> None:
        self._head.unlink(missing_ok=True)  # first: without it the rest counts for nothing
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06}"

    def _found(self, run: str) -> Done | None:
        if not self._head.exists():
            return None
        try:
            found = msgspec.msgpack.decode(self._head.read_bytes(), type=Done)
        except (msgspec.DecodeError, OSError) as error:
            raise self.unreadable(error) from error
        if found.run != run:
            raise ConfigError(
                f"checkpoint {self._folder} is of another run ({found.run}); finish that one, or"
                " begin this one anew with --restart."
            )
        return found
