"""The tables that `steer_rows` reads: allocated once, changed between forward passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neuroscope_vllm.core.sae.sae import normalise_rows
from neuroscope_vllm.core.steering.arithmetic import Vector
from neuroscope_vllm.core.steering.settled import MAX_RULES, MAX_SLOTS
from neuroscope_vllm.engine.serving import steer_rows
from neuroscope_vllm.engine.serving.steer_rows import NEVER

FOREVER = (1 << 31) - 1


class SteerTables(nn.Module):
    """An entry is a request's place in the tables; a layer of it has `num_slots` vectors.

    Takes `entries x num_slots x d_model x 8` bytes a layer.
    """

    rows: Tensor

    def __init__(
        self,
        input_norms: dict[int, str | None],
        *,
        num_rows: int,
        d_model: int,
        entries: int,
        num_slots: int = MAX_SLOTS,
        vectors_on: torch.device | None = None,
    ) -> None:
        """
        Args:
            input_norms: `SAEInfo.input_norm` of each layer that can be steered.
            vectors_on: Device of what is multiplied with rows; None: of the other tables.
        """
        super().__init__()
        self.layers = list(input_norms)
        self.entries, self.num_slots = entries, num_slots
        self._input_norms = input_norms
        self._add("rows", (num_rows, 2), torch.int32, -1)
        self._add("last", (entries, MAX_RULES), torch.int32)
        self._add("met", (entries, MAX_RULES), torch.int32, NEVER)
        for layer in self.layers:
            self._add(f"slots_{layer}", (entries, num_slots, 5), torch.int32)
            with torch.device(vectors_on or torch.get_default_device()):
                self._add(f"numbers_{layer}", (entries, num_slots, 7), torch.float32)
                self._add(f"reading_{layer}", (entries, num_slots, d_model), torch.float32)
                self._add(f"writing_{layer}", (entries, num_slots, d_model), torch.float32)
            self._add(f"activation_{layer}", (num_rows, num_slots), torch.float32)
        self._dirty = 0  # rows that may name an entry

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float = 0) -> None:
        self.register_buffer(name, torch.full(shape, value, dtype=dtype), persistent=False)

    def of_layer(self, layer: int) -> list[Any]:
        """All but the first two arguments of `steer_rows.steer`."""
        table = self.get_buffer
        return [
            table("rows"),
            table("last"),
            table("met"),
            table(f"slots_{layer}"),
            table(f"numbers_{layer}"),
            table(f"reading_{layer}"),
            table(f"writing_{layer}"),
            table(f"activation_{layer}"),
            self._input_norms[layer],
        ]

    def activation(self, layer: int) -> Tensor:
        """float32 [num_rows, num_slots]: f before the edits; NaN where no slot was live."""
        return self.get_buffer(f"activation_{layer}")

    def activation_after(self, layer: int, entry: int, slots: int, x: Tensor) -> Tensor:
        """float32 [n, slots]: f of an entry's first `slots`, of rows x [n, d_model] as edited."""
        reading = self.get_buffer(f"reading_{layer}")[entry, :slots]
        x = x.float()
        pre = normalise_rows(x, self._input_norms[layer]) @ reading.t()
        return _gated(pre, self.get_buffer(f"numbers_{layer}")[entry, :slots], x)

    def activations_after(self, layer: int, rows: slice, slots: int, x: Tensor) -> Tensor:
        """The same of the step's `rows`, each of its own entry."""
        entry = self.rows[rows, steer_rows.ENTRY].to(x.device)
        reading = self.get_buffer(f"reading_{layer}")[:, :slots].index_select(0, entry)
        x = x.float()
        each = normalise_rows(x, self._input_norms[layer]).unsqueeze(1)
        numbers = self.get_buffer(f"numbers_{layer}")[:, :slots].index_select(0, entry)
        return _gated(torch.linalg.vecdot(each, reading), numbers, x)

    def rules_met(self, entry: int) -> Tensor:
        """int32 [MAX_RULES], a copy: see `steer_rows`."""
        return self.get_buffer("met")[entry].clone()

    def clear_entry(self, entry: int, last: list[int], met: Tensor | None = None) -> None:
        """Nothing is done for it any more; `last` of its next rules, and `rules_met` of them."""
        for layer in self.layers:
            self.get_buffer(f"slots_{layer}")[entry] = 0
        self.get_buffer("met")[entry] = NEVER if met is None else met
        if last:
            self.get_buffer("last")[entry, : len(last)] = torch.tensor(last, dtype=torch.int32).to(
                self.rows.device
            )

    def write(
        self,
        entry: int,
        layer: int,
        slot: int,
        vector: Vector,
        *,
        per_activation: float = 0.0,
        constant: float = 0.0,
        first: int = 0,
        end: int = FOREVER,
        gate: int = -1,
        meets: int = -1,
        above: float = 0.0,
    ) -> None:
        """Fill a slot; see `steer_rows`."""
        of_vector = (vector.bias, vector.threshold, vector.normed, vector.sink_norm)
        numbers = torch.tensor([per_activation, constant, *of_vector, above])
        self._put(f"numbers_{layer}", entry, slot, numbers)
        self._put(f"reading_{layer}", entry, slot, vector.reading)
        self._put(f"writing_{layer}", entry, slot, vector.writing)
        used = torch.tensor([1, first, end, gate, meets], dtype=torch.int32)
        self._put(f"slots_{layer}", entry, slot, used)

    def _put(self, name: str, entry: int, slot: int, values: Tensor) -> None:
        if self.rows.is_cuda:
            values = values.pin_memory()
        self.get_buffer(name)[entry, slot].copy_(values, non_blocking=True)

    def fill_rows(self, rows: NDArray[np.int32]) -> None:
        """The next forward pass's rows int32 [n, 2]; in stream order on CUDA."""
        host = torch.from_numpy(rows)
        device = self.rows.device
        if device.type == "cuda":
            host = host.pin_memory()
        self.rows[: len(rows)].copy_(host, non_blocking=True)
        self._dirty = len(rows)
        for layer in self.layers:
            self.activation(layer)[: len(rows)].fill_(torch.nan)

    def clear_rows(self) -> None:
        """After a forward pass: dummy runs and padding must find nothing to do."""
        if self._dirty:
            self.rows[: self._dirty].fill_(-1)
            self._dirty = 0


def _gated(pre: Tensor, numbers: Tensor, x: Tensor) -> Tensor:
    """f of pre-activations [n, slots] without their bias; numbers: [n or none, slots, 7]."""
    pre = pre + numbers[..., steer_rows.BIAS]
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    heard = norm <= numbers[..., steer_rows.SINK_NORM]
    return torch.where((pre > numbers[..., steer_rows.THRESHOLD]) & heard, pre, 0.0)
