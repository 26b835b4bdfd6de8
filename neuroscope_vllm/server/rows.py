"""Feature rows as plain Python values: one conversion per message, none per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neuroscope_vllm.core import wire


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Columns of one layer, indexed by row; -1 in `index` is padding."""

    layer: int
    index: list[list[int]]
    activation: list[list[float]]
    score: list[list[float]]
    l0: list[int]
    sink: list[int]


class Rows(NamedTuple):
    """All rows of one step message."""

    positions: list[int]
    token_ids: list[int]
    layers: list[LayerRows]


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
    return Rows(positions.tolist(), token_ids.tolist(), layers)


def unpack_layer(message: wire.LayerFeatures, rows: int) -> LayerRows:
    """One layer of `rows` rows. Raises ValueError when an array has another size."""
    shape = (rows, message.top_k)
    return LayerRows(
        message.layer,
        wire.int32(message.index).reshape(shape).tolist(),
        _shortest(wire.float32(message.activation).reshape(shape)),
        _shortest(wire.float32(message.score).reshape(shape)),
        wire.int32(message.l0).reshape(rows).tolist(),
        np.frombuffer(message.sink, np.uint8).reshape(rows).tolist(),
    )


def _shortest(values: NDArray[np.float32]) -> list[list[float]]:
    """Doubles that print as the shortest decimal of the float32: 3.82, not 3.819999933242798."""
    return values.astype("U").astype(np.float64).tolist()
