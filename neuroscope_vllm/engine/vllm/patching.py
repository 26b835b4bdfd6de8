"""Activation patching in a worker: rows that a step replaces, and rows that are read.

What is wanted of a request travels in its SamplingParams. Every tensor-parallel rank replaces, as
each holds the whole residual stream; the first one reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch

from neuroscope_vllm.core.patching.swap import Replacement
from neuroscope_vllm.engine.vllm.ids import PATCHING

if TYPE_CHECKING:
    from neuroscope_vllm.engine.serving.step import StepView
    from neuroscope_vllm.engine.vllm.hook import ActivationHook

TAKE_RPC = "neuroscope_take_residuals"


class PatchSpec(TypedDict):
    """What is done in a request.

    Attributes:
        number: The reader's, of its sequence.
        read: Layers whose rows are kept.
        edits: Layer, position and float32 [d_model], as bytes.
        salts: For `prefix_salt`.
    """

    number: int
    read: list[int]
    edits: list[tuple[int, int, bytes]]
    salts: tuple[tuple[int, bytes], ...]


class Part(TypedDict):
    """Rows of a step: of positions from `first` on, float32 [n, d_model] as bytes."""

    number: int
    layer: int
    first: int
    rows: bytes


def reading(number: int, layers: Sequence[int]) -> PatchSpec:
    return PatchSpec(number=number, read=list(layers), edits=[], salts=())


def replacing(edits: Sequence[Replacement]) -> PatchSpec:
    """Requests with the same edits share what they compute; up to the first, all do."""
    own = [
        (edit.layer, edit.position, edit.residual.float().numpy().tobytes())
        for edit in sorted(edits, key=lambda edit: edit[:2])
    ]
    salt = hashlib.blake2b(digest_size=32)
    for layer, position, residual in own:
        salt.update(f"{layer} {position} ".encode() + residual)
    first = min((position for _, position, _ in own), default=None)
    salts = () if first is None else ((first, salt.digest()),)
    return PatchSpec(number=-1, read=[], edits=own, salts=salts)


def patching_of(params: Any) -> PatchSpec | None:
    """What `patch_engine` left in SamplingParams."""
    return (params.extra_args or {}).get(PATCHING) if params is not None else None


class Patcher:
    """Around each forward pass; see `step.StepWatcher`."""

    def __init__(self, hook: ActivationHook, reads: bool) -> None:
        self._hook, self._reads = hook, reads
        self._requests: dict[str, PatchSpec] = {}
        self._parts: list[Part] = []

    def starting(self, scheduler_output: Any) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self._requests.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            given = patching_of(new.sampling_params)
            if given is not None:
                self._requests[new.req_id] = given

    def prepared(self, step: StepView) -> None:
        assert self._hook.replacements is not None
        places: dict[int, tuple[list[int], list[bytes]]] = {}
        for request, rows, first in self._running(step):
            for layer, position, residual in request["edits"]:
                row = rows.start + position - first
                if row in rows and layer in self._hook.layers:
                    which, what = places.setdefault(layer, ([], []))
                    which.append(row)
                    what.append(residual)
        for layer, (which, what) in places.items():
            found = np.frombuffer(bytearray().join(what), np.float32).reshape(len(what), -1)
            self._hook.replacements.fill(layer, which, torch.from_numpy(found))

    def ran(self, step: StepView) -> None:
        assert self._hook.replacements is not None
        self._hook.replacements.clear()
        if not self._reads:
            return
        for request, rows, first in self._running(step):
            for layer in set(request["read"]).intersection(self._hook.layers):
                kept = self._hook.resid_post(layer)[rows.start : rows.stop].float().cpu()
                part = Part(number=request["number"], layer=layer, first=first,
                            rows=kept.numpy().tobytes())  # fmt: skip
                self._parts.append(part)

    def take(self) -> list[Part]:
        """What was read since the last time; a preempted request's rows may be there twice."""
        parts, self._parts = self._parts, []
        return parts

    def _running(self, step: StepView) -> Iterator[tuple[PatchSpec, range, int]]:
        """Of each request that is patched: its rows, and the position of the first."""
        for i, request_id in enumerate(step.request_ids):
            request = self._requests.get(request_id)
            if request is not None:
                rows = range(step.row_starts[i], step.row_starts[i + 1])
                yield request, rows, step.first_positions[i]
