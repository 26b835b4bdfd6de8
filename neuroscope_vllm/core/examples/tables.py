"""From what is kept of a corpus to the rows of the three files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neuroscope_vllm.core.examples.choice import PLACE_BITS, Choice, Table, ranges
from neuroscope_vllm.core.examples.hashes import held_out
from neuroscope_vllm.core.examples.merge import Merged
from neuroscope_vllm.core.examples.pairs import partners
from neuroscope_vllm.core.examples.records import SAMPLE, TOP
from neuroscope_vllm.core.examples.store import SCHEMAS

_FEATURES = 4096  # features.parquet's rows at a time
_ROWS = 1 << 14  # examples at a time: about 40 MiB


class Texts:
    """The corpus as texts of tokens."""

    def __init__(self, sequences: Iterable[NDArray[np.int32]], texts: Iterable[list[str]]) -> None:
        """Of token ids, and the texts of each sequence's tokens, which joined are its text."""
        parts, held, lengths = [], [], []
        for sequence, of_tokens in zip(sequences, texts, strict=True):
            parts.append(pa.array(of_tokens, pa.string()))
            held.append(held_out(sequence))
            lengths.append(len(sequence))
        self._texts = pa.concat_arrays(parts) if parts else pa.array([], pa.string())
        self.held_out = np.array(held, bool)
        self.length = np.array(lengths, np.int64)
        self._start = np.cumsum(self.length) - self.length

    def of(
        self,
        sequence: NDArray[np.int64],
        position: NDArray[np.int64],
        size: NDArray[np.int64],
    ) -> pa.Array:
        """Lists of the texts of `size` tokens from each place on."""
        index = ranges(self._start[sequence] + position, size)
        return _lists(size, self._texts.take(pa.array(index)))


def batches(
    merged: Merged, texts: Texts, before: int, after: int
) -> dict[str, Iterator[pa.RecordBatch]]:
    """Rows of each of SCHEMAS."""
    return {
        "examples": _examples(merged, texts, before, after),
        "features": _features(merged),
        "contexts": _contexts(merged, texts, before + 1 + after),
    }


def _examples(merged: Merged, texts: Texts, before: int, after: int) -> Iterator[pa.RecordBatch]:
    table, choice = merged.examples.kept()
    rows, top = _by_feature(table, choice, merged)
    for at in range(0, len(rows), _ROWS):
        part, is_top = table.take(rows[at : at + _ROWS]), top[at : at + _ROWS]
        sequence, position = _places(part)
        first = np.maximum(position - before, 0)
        size = np.minimum(position + after + 1, texts.length[sequence]) - first
        in_context = position - first
        activations = np.zeros(int(size.sum()), np.float32)
        own = np.cumsum(size) - size + in_context
        activations[np.repeat(own, part.size) + part.item] = part.value
        columns = [
            merged.examples.feature(part.ident).astype(np.int32),
            np.where(is_top, TOP, SAMPLE),
            part.activation,
            sequence.astype(np.int32),
            position.astype(np.int32),
            texts.held_out[sequence],
            texts.of(sequence, first, size),
            _lists(size, pa.array(activations)),
            in_context.astype(np.int32),
        ]
        yield _batch("examples", columns)


def _by_feature(
    table: Table, choice: Choice, merged: Merged
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Rows of the table by feature, its strongest first, and whether each is one of those."""
    rows = np.concatenate(choice)
    top = np.arange(len(rows)) < len(choice.top)
    found = np.lexsort((~top, merged.examples.feature(table.ident[rows])))
    return rows[found], top[found]


def _features(merged: Merged) -> Iterator[pa.RecordBatch]:
    pairs = merged.pairs.total()
    for at in range(0, merged.width, _FEATURES):
        features = range(at, min(at + _FEATURES, merged.width))
        feature, partner, count = partners(pairs, merged.width, features)
        size = np.bincount(feature - at, minlength=len(features))
        columns = [
            np.arange(features.start, features.stop, dtype=np.int32),
            merged.firings[features.start : features.stop],
            merged.maximum[features.start : features.stop],
            _lists(size, pa.array(partner.astype(np.int32))),
            _lists(size, pa.array(count)),
        ]
        yield _batch("features", columns)


def _contexts(merged: Merged, texts: Texts, length: int) -> Iterator[pa.RecordBatch]:
    """In the order of the corpus."""
    table, _ = merged.contexts.kept()
    table = table.take(np.argsort(table.place))
    sequence, position = _places(table)
    columns = [
        sequence.astype(np.int32),
        position.astype(np.int32),
        texts.of(sequence, position, np.full(len(sequence), length)),
        _lists(table.size, pa.array(table.item)),
        _lists(table.size, pa.array(table.value)),
    ]
    yield _batch("contexts", columns)


def _batch(name: str, columns: list[pa.Array | NDArray[np.generic]]) -> pa.RecordBatch:
    schema = SCHEMAS[name]
    arrays = [pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lists(size: NDArray[np.integer], values: pa.Array) -> pa.Array:
    ends = np.cumsum(size, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([np.zeros(1, np.int32), ends])), values)


def _places(table: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return table.place >> PLACE_BITS, table.place & ((1 << PLACE_BITS) - 1)
