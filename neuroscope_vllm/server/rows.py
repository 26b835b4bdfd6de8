"""Feature rows as plain Python values: one conversion per message, none per token."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from math import isnan
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.events import SteeredFeature

ROWS_OVERHEAD_BYTES = 700
"""Of the lists around rows."""
ROW_BYTES, FEATURE_BYTES = 400, 120
"""Of one row of a layer, and of each feature in it."""
FEW_VALUES = 64
"""Fewer are sooner printed one by one than rounded together."""
POWERS = np.array([float(f"1e{n}") for n in range(23)])


NOTHING: Mapping[Any, Any] = MappingProxyType({})


class Row(NamedTuple):
    """What one layer has of one token; -1 in `index` is padding."""

    layer: int
    index: list[int]  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.index)
    activation: list[float]
    score: list[float]
    l0: int
    sink: int


class Rows(NamedTuple):
    """All rows of one step message.

    `layers` holds the rows of each layer; `steered` is by row and layer, `hits` by row.
    """

    positions: list[int]
    token_ids: list[int]
    layers: list[list[Row]]
    steered: Mapping[tuple[int, int], list[SteeredFeature]] = NOTHING
    hits: Mapping[int, list[wire.RuleHit]] = NOTHING

    def part(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) for themselves: to keep them keeps no others."""
        layers = [one[start:stop] for one in self.layers]
        steered = hits = NOTHING
        if self.steered:
            steered = {
                (row - start, layer): found
                for (row, layer), found in self.steered.items()
                if start <= row < stop
            }
        if self.hits:
            hits = {row - start: met for row, met in self.hits.items() if start <= row < stop}
        return Rows(self.positions[start:stop], self.token_ids[start:stop], layers, steered, hits)

    @property
    def bytes(self) -> int:
        """What they take in memory, estimated generously."""
        size = ROWS_OVERHEAD_BYTES + 500 * (len(self.steered) + len(self.hits))
        for one in self.layers:
            if one:
                size += len(one) * (ROW_BYTES + FEATURE_BYTES * len(one[0].index))
        return size


def unpack(message: wire.StepFeatures) -> Rows:
    """Raises ValueError when arrays of the message do not fit each other."""
    positions = wire.int32(message.positions)
    token_ids = wire.int32(message.token_ids)
    rows = len(positions)
    if len(token_ids) != rows:
        raise ValueError(f"{rows} positions but {len(token_ids)} token ids")
    for span in message.spans:
        if not 0 <= span.start <= span.stop <= rows:
            raise ValueError(f"span [{span.start}, {span.stop}) does not lie in {rows} rows")
    layers = [
        unpack_layer(layer, rows) for layer in sorted(message.layers, key=lambda one: one.layer)
    ]
    steered, hits = {}, {}
    for part in message.steered:
        steered |= _steered(part, message.spans)
    for hit in message.hits:
        hits.setdefault(hit.row, []).append(hit)
    return Rows(positions.tolist(), token_ids.tolist(), layers, steered, hits)


def _steered(
    message: wire.SteeredRows, spans: list[wire.Span]
) -> dict[tuple[int, int], list[SteeredFeature]]:
    if not 0 <= message.span < len(spans):
        raise ValueError(f"steered rows are of span {message.span}, which is none of {len(spans)}")
    span = spans[message.span]
    shape = (span.stop - span.start, len(message.features))
    before = _shortest(wire.float32(message.before).reshape(shape))
    after = _shortest(wire.float32(message.after).reshape(shape))
    found = {}
    for row, values in enumerate(zip(before, after, strict=True), span.start):
        changed = [
            SteeredFeature(*one)
            for one in zip(message.features, *values, strict=True)
            if not isnan(one[1])
        ]
        if changed:
            found[row, message.layer] = changed
    return found


def unpack_layer(message: wire.LayerFeatures, rows: int) -> list[Row]:
    """One layer of `rows` rows. Raises ValueError when an array has another size."""
    if message.top_k < 0:  # which numpy would take for: as many as there are
        raise ValueError(f"top_k is {message.top_k}")
    shape = (rows, message.top_k)
    columns = (
        wire.int32(message.index).reshape(shape).tolist(),
        _shortest(wire.float32(message.activation).reshape(shape)),
        _shortest(wire.float32(message.score).reshape(shape)),
        wire.int32(message.l0).reshape(rows).tolist(),
        np.frombuffer(message.sink, np.uint8).reshape(rows).tolist(),
    )
    return list(map(Row, repeat(message.layer), *columns))


def _shortest(values: NDArray[np.float32]) -> list[list[float]]:
    """Doubles that print as the shortest decimal of the float32: 3.82, not 3.819999923342798."""
    if values.size < FEW_VALUES:
        return _printed(values).tolist()
    out = values.astype(np.float64)
    size = np.abs(out)
    # Of these the nearest decimal of so many digits is an integer over a power of ten that a
    # double holds, so it comes out exact. A power of two may have a shorter name than the nearest.
    plain = (size >= 1e-12) & (size < 1e6) & (np.frexp(size)[0] != 0.5)
    tens = np.floor(np.log10(size, where=plain, out=np.zeros_like(size))).astype(np.int64)
    left = plain | (size > 0) | np.isnan(size)
    for digits in range(6, 10):  # one that has fewer comes out of six; nine name every float32
        scale = POWERS[np.where(plain, digits - 1 - tens, 0)]
        rounded = np.rint(out * scale) / scale
        found = left & plain & (rounded.astype(np.float32) == values)
        np.copyto(out, rounded, where=found)
        left &= ~found
    if left.any():
        out[left] = _printed(values[left])
    return out.tolist()


def _printed(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The same by way of text, a microsecond a value."""
    return values.astype("U").astype(np.float64)
