"""Activations as the few that are not zero, and how well they reconstruct: for many rows at once.

Rows are taken in chunks, so that rows x width never exists at once: 8,192 rows of an SAE of width
131k would take 4 GiB. Firings take 20 bytes each, and as much again while a chunk's are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError

if TYPE_CHECKING:
    from neuroscope_vllm.core.sae.sae import SAE

MAX_CHUNK_BYTES = 256 << 20
CELL_BYTES = 4 + 2  # of one feature of one row: its pre-activation, and two flags


class Firings(NamedTuple):
    """The m active features of some rows, ordered by row, then feature.

    Attributes:
        row: int64 [m].
        feature: int64 [m].
        activation: float32 [m], above zero.
    """

    row: Tensor
    feature: Tensor
    activation: Tensor


def encode_sparse(sae: SAE, x: Tensor, *, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> Firings:
    """The entries of `sae.encode(x)` that are not zero.

    Args:
        x: [n, d_model], any float dtype, raw residuals, on the SAE's device.
        max_chunk_bytes: What temporaries of rows x width may take; one row is always taken.
    """
    parts = [
        Firings(firings.row + start, firings.feature, firings.activation)
        for start, _, firings in _chunks(sae, x, max_chunk_bytes)
    ]
    return Firings(*(torch.cat(column) for column in zip(*parts, strict=True)))


def firings_of(activations: Tensor, active: Tensor | None = None) -> Firings:
    """The entries of float32 [n, width] where `active` (bool, alike; by default: above zero)."""
    active = activations > 0 if active is None else active
    # 1-D: the 2-D nonzero of torch is several times slower on the CPU.
    cell = active.reshape(-1).nonzero().squeeze(1)
    row = cell.div(activations.shape[1], rounding_mode="floor")
    return Firings(row, cell - row * activations.shape[1], activations.reshape(-1)[cell])


def decode_sparse(sae: SAE, firings: Firings, num_rows: int, of: Tensor | None = None) -> Tensor:
    """Reconstruction float32 [num_rows, d_model]: `sae.decode` of the same activations.

    Args:
        firings: Ordered by row, on the SAE's device; rows without any reconstruct to the bias.
        of: The rows that were encoded; as in `SAE.decode`.

    Raises:
        SAEError: `of` is needed and was not given.
    """
    bounds = torch.arange(num_rows, device=firings.row.device)
    x = torch.nn.functional.embedding_bag(
        firings.feature,
        sae.W_dec.float(),
        torch.searchsorted(firings.row, bounds),
        mode="sum",
        per_sample_weights=firings.activation,
    )
    return sae.restored(x.add_(sae.b_dec.float()), of)


def count_firings(sae: SAE, x: Tensor, *, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> int:
    """Number of active features of all rows of x [n, d_model] together."""
    return sum(firings.row.numel() for _, _, firings in _chunks(sae, x, max_chunk_bytes))


@dataclass(slots=True, eq=False)
class Reconstruction:
    """How well an SAE reconstructs rows; sums, so those of shards merge into that of all rows.

    Leave special tokens and attention sinks out: one of them can outweigh all other rows.

    Attributes:
        num_rows: Rows seen.
        num_firings: Active features of all of them.
        squared_error: Sum of |x - decode(encode(x))|^2, in fp64.
        total: float64 [d_model], sum of x.
        total_square: float64 [d_model], sum of its squares.
    """

    num_rows: int
    num_firings: int
    squared_error: float
    total: Tensor
    total_square: Tensor

    @classmethod
    def empty(cls, d_model: int) -> Reconstruction:
        zeros = torch.zeros(d_model, dtype=torch.float64)
        return cls(0, 0, 0.0, zeros, zeros.clone())

    def update(self, sae: SAE, x: Tensor, *, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> None:
        """Encode and decode rows x [n, d_model], raw residuals on the SAE's device; add them.

        Raises:
            SAEError: It is a transcoder, which reconstructs something else than x.
        """
        if sae.info.output_point is not None:
            raise SAEError(
                f"SAE {sae.info.source} predicts {sae.info.output_point} from "
                f"{sae.info.hook_point}; compare decode(encode(x)) with the former instead."
            )
        for _, rows, firings in _chunks(sae, x, max_chunk_bytes):
            decoded = decode_sparse(sae, firings, len(rows), of=rows)
            self.add(rows, decoded, firings.row.numel())

    def add(self, x: Tensor, decoded: Tensor, num_firings: int) -> None:
        """Add rows x [n, d_model] that were already decoded to [n, d_model], on any device."""
        if x.device.type == "mps":  # which has no float64
            x, decoded = x.cpu(), decoded.cpu()
        x = x.double()
        self.num_rows += len(x)
        self.num_firings += num_firings
        # By columns first: torch splits a sum of everything among threads, and rounds by how many.
        self.squared_error += float((x - decoded).square_().sum(dim=0).cpu().sum())
        self.total += x.sum(dim=0).cpu()
        self.total_square += x.square_().sum(dim=0).cpu()

    def merge(self, other: Reconstruction) -> Reconstruction:
        """Both together, as if one had seen all the rows."""
        return replace(
            self,
            num_rows=self.num_rows + other.num_rows,
            num_firings=self.num_firings + other.num_firings,
            squared_error=self.squared_error + other.squared_error,
            total=self.total + other.total,
            total_square=self.total_square + other.total_square,
        )

    @property
    def fvu(self) -> float:
        """`sum |x - decode(encode(x))|^2 / sum |x - mean(x)|^2`, as in Gemma Scope's notebook; NaN
        of no rows."""
        spread = self.total_square - self.total.square() / max(self.num_rows, 1)
        return float(self.squared_error / spread.sum())

    @property
    def explained_variance(self) -> float:
        """`1 - fvu`."""
        return 1.0 - self.fvu

    @property
    def l0(self) -> float:
        """Mean number of active features a row; 0 of no rows."""
        return self.num_firings / max(self.num_rows, 1)


def _chunks(sae: SAE, x: Tensor, max_bytes: int) -> Iterator[tuple[int, Tensor, Firings]]:
    """(index of the first row, rows, their firings), `row` from 0 in each chunk; at least one."""
    for start in range(0, max(len(x), 1), step := max(1, max_bytes // (CELL_BYTES * sae.width))):
        rows = x[start : start + step]
        pre, active = sae.preactivations(rows)
        yield start, rows, firings_of(pre, active)
