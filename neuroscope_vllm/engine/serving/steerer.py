"""Steering in a worker: from the requests that steer to the rows of a step.

A request takes an entry of the tables when it is in a step and keeps it until it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np
import torch

from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.steering.arithmetic import Vector, direction_vector, feature_vector
from neuroscope_vllm.core.steering.settled import NO_RULE, Slot, Steering
from neuroscope_vllm.engine.serving.steer_report import SpanSteering
from neuroscope_vllm.engine.serving.steer_tables import FOREVER, SteerTables
from neuroscope_vllm.engine.serving.step import StepView


class Steered:
    """A request that steers."""

    __slots__ = ("entry", "met", "prompt_length", "reported", "steering")

    def __init__(self, steering: Steering, prompt_length: int, told: Collection[int]) -> None:
        """`told`: layers of which one feature's activation can be told alone."""
        self.steering = steering
        self.prompt_length = prompt_length
        self.entry: int | None = None
        self.met: torch.Tensor | None = None
        """What its entry knew of its rules when another request took it."""
        self.reported: dict[int, list[Slot]] = {}
        """By layer, slots of features: readers hear of those."""
        for slot in steering.slots:
            if slot.feature is not None and slot.layer in told:
                self.reported.setdefault(slot.layer, []).append(slot)


class Steerer:
    """Keeps the tables in step with the requests that run."""

    def __init__(
        self,
        tables: SteerTables,
        saes: dict[int, SAE],
        directions: dict[str, torch.Tensor],
        sink_norms: dict[int, float],
    ) -> None:
        """`saes`: by layer, on the CPU; `directions`: by name, [d_model]; `sink_norms`: of layers
        with a calibration."""
        self._tables = tables
        self._saes = saes
        self._told = [layer for layer, sae in saes.items() if sae.info.k is None]
        self._directions = directions
        self._sink_norms = sink_norms
        self._requests: dict[str, Steered] = {}
        self._running: list[tuple[int, Steered]] = []  # in the step, by their number
        self._holders: list[Steered | None] = [None] * tables.entries

    def knows(self, request_id: str) -> bool:
        return request_id in self._requests

    def begin(self, request_id: str, steering: Steering, prompt_length: int) -> None:
        """From the next step on, whatever it was steered with before."""
        self.forget(request_id)
        self._requests[request_id] = Steered(steering, prompt_length, self._told)

    def forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None and request.entry is not None:
            self._holders[request.entry] = None

    def prepared(self, step: StepView) -> None:
        """Just before the forward pass: its rows to the entries of their requests."""
        self._running = [
            (i, request)
            for i, request_id in enumerate(step.request_ids)
            if (request := self._requests.get(request_id)) is not None
        ]
        if not self._running:
            return
        running = {id(request) for _, request in self._running}
        rows = np.full((step.num_rows, 2), -1, dtype=np.int32)
        for i, request in self._running:
            entry = self._take_entry(request, running) if request.entry is None else request.entry
            start, stop = step.row_starts[i], step.row_starts[i + 1]
            rows[start:stop, 0] = entry
            rows[start:stop, 1] = np.arange(stop - start) + step.first_positions[i]
        self._tables.fill_rows(rows)

    def found(
        self, step: StepView, resid_post: Callable[[int], torch.Tensor]
    ) -> list[SpanSteering]:
        """Of the step that has just run; copies, in stream order. `resid_post`: the hook's."""
        parts = []
        for layer in self._tables.layers:
            x = resid_post(layer)
            for run in self._runs(step, layer):
                parts += self._found(step, layer, run, x)
        return parts

    def _runs(self, step: StepView, layer: int) -> list[list[tuple[int, Steered]]]:
        """Requests that are read in one go: one with several rows, or neighbours with a row each; a
        torch call for every request would cost more than its arithmetic."""
        runs: list[list[tuple[int, Steered]]] = []
        starts, before = step.row_starts, None
        for span, request in self._running:
            if layer not in request.reported:
                continue
            single = starts[span + 1] - starts[span] == 1
            if not single or before != span - 1:
                runs.append([])
            runs[-1].append((span, request))
            before = span if single else None
        return runs

    def _found(
        self, step: StepView, layer: int, run: list[tuple[int, Steered]], x: torch.Tensor
    ) -> list[SpanSteering]:
        tables, starts, (span, first) = self._tables, step.row_starts, run[0]
        rows = slice(starts[span], starts[run[-1][0] + 1])
        count = max(len(one.reported[layer]) for _, one in run)
        before = tables.activation(layer)[rows, :count]
        if len(run) == 1:
            assert first.entry is not None
            after = tables.activation_after(layer, first.entry, count, x[rows])
        else:
            after = tables.activations_after(layer, rows, count, x[rows])
        both = torch.stack([before.to(after.device), after], dim=1)
        split = both.split(1) if len(run) > 1 else (both,)
        return [
            SpanSteering(span, starts[span], layer, one.reported[layer], one.steering.rules, found)
            for (span, one), found in zip(run, split, strict=True)
        ]

    def ran(self) -> None:
        self._tables.clear_rows()
        self._running = []

    def _take_entry(self, request: Steered, running: set[int]) -> int:
        """A free one, or that of a request that is preempted: a step has no more requests than
        there are entries."""
        free = (i for i, holder in enumerate(self._holders) if holder is None)
        absent = (i for i, holder in enumerate(self._holders) if id(holder) not in running)
        entry = next(free, None)
        entry = next(absent) if entry is None else entry
        before = self._holders[entry]
        if before is not None:
            before.entry, before.met = None, self._tables.rules_met(entry)
        self._holders[entry], request.entry = request, entry
        self._tables.clear_entry(entry, [rule.last for rule in request.steering.rules], request.met)
        for layer in self._tables.layers:
            # Features first: theirs are the columns that are reported.
            slots = sorted(request.steering.of_layer(layer), key=lambda slot: slot.feature is None)
            for number, slot in enumerate(slots):
                self._write(entry, number, slot, request.prompt_length)
        return entry

    def _write(self, entry: int, number: int, slot: Slot, prompt_length: int) -> None:
        self._tables.write(
            entry,
            slot.layer,
            number,
            self._vector(slot),
            per_activation=slot.per_activation,
            constant=slot.constant,
            first=prompt_length if slot.positions == "generated" else 0,
            end=prompt_length if slot.positions == "prompt" else FOREVER,
            gate=slot.gate,
            meets=slot.meets,
            above=slot.above if slot.meets != NO_RULE else 0.0,
        )

    def _vector(self, slot: Slot) -> Vector:
        if slot.feature is not None:
            sink_norm = self._sink_norms.get(slot.layer, math.inf)
            return feature_vector(self._saes[slot.layer], slot.feature, sink_norm)
        assert slot.direction is not None
        return direction_vector(self._directions[slot.direction])
