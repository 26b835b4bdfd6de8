"""Rows of a step to top features to a message.

On CUDA the runner's thread only copies the step's rows (stream-ordered, no sync). A thread of our
own, with a stream of its own, encodes them, brings the result to the host in one copy per step and
hands it to the sender; the runner waits for none of it.

Elsewhere the runner encodes before it goes on. On a CPU a thread beside it was slower, at batch 1
and 16: it takes turns with the model for the GIL, and vLLM's engine core spins on the other cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.sae.encoder import TopKEncoder
from neuroscope_vllm.engine.serving.steer_report import SpanSteering, rule_hits, steered_rows
from neuroscope_vllm.engine.serving.step import StepView

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerEncoder:
    """Everything that turns one layer's rows into packed results."""

    layer: int
    topk: TopKEncoder
    sink_norm: float | None

    @property
    def packed_width(self) -> int:
        return 3 * self.topk.k + 2

    def encode(self, rows: Tensor) -> Tensor:
        """int32[n, 3k + 2]: index, activation bits, score bits, l0, sink, in that order."""
        rows = rows.float()
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        index, activation, score, l0 = self.topk.encode(rows)
        if self.sink_norm is None:
            sink = torch.zeros_like(norm, dtype=torch.bool)
        else:
            sink = norm > self.sink_norm
            index = index.masked_fill(sink, -1)
            activation = activation.masked_fill(sink, 0.0)
            score = score.masked_fill(sink, 0.0)
        bits = [activation.view(torch.int32), score.view(torch.int32)]
        return torch.cat([index.int(), *bits, l0.int().unsqueeze(1), sink.int()], dim=1)

    def message(self, packed: Tensor) -> wire.LayerFeatures:
        k = self.topk.k
        host = packed.numpy()
        return wire.LayerFeatures(
            layer=self.layer,
            top_k=k,
            index=host[:, :k].tobytes(),
            activation=host[:, k : 2 * k].tobytes(),
            score=host[:, 2 * k : 3 * k].tobytes(),
            l0=host[:, 3 * k].tobytes(),
            sink=host[:, 3 * k + 1].astype("u1").tobytes(),
        )


@dataclass(frozen=True, slots=True)
class _Job:
    number: int  # of the step, from 0
    step: StepView  # its tensors are copies if the encode runs beside the next step
    rows: list[Tensor]  # one per layer encoder; likewise; none of a step that is dropped
    ready: torch.cuda.Event | None
    steered: list[SpanSteering]


class EncodePipeline:
    """Encodes every row of every step of one worker.

    On CUDA, steps wait in a queue bounded by rows; past `max_pending_rows` a step is dropped and
    counted (`rows_dropped`), so a model that outruns its SAE costs features, never tokens.
    `submit_us` is the time the runner's thread spent here, `encode_us` that of encoding.
    """

    def __init__(
        self,
        encoders: list[LayerEncoder],
        send: Callable[[wire.StepFeatures], object],
        engine: str,
        num_layers: int,
        device: torch.device,
        max_pending_rows: int,
        stop: Callable[[str, str], object] = lambda request_id, rule: None,
    ) -> None:
        """
        Args:
            num_layers: Observed layers of the whole model, on other pipeline stages included.
            device: Where the rows are, and the encoders.
            stop: Called with a request's internal id and the rule that ends it.
        """
        self.counters: Counter[str] = Counter()
        self.failing = False  # the last step could not be encoded
        self._encoders = encoders
        self._send = send
        self._engine = engine
        self._num_layers = num_layers
        self._device = device
        self._max_pending_rows = max_pending_rows
        self._stop = stop
        self._pending_rows = 0
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._device.type == "cuda":
            self._thread = threading.Thread(target=self._run, name="neuroscope-encode", daemon=True)
            self._thread.start()

    def submit(
        self, step: StepView, rows: list[Tensor], steered: Sequence[SpanSteering] = ()
    ) -> None:
        """Take a step's rows [num_rows, d_model], one tensor for each encoder; they need not
        outlast the call."""
        began = time.perf_counter()
        count = step.num_rows
        number = self.counters["steps"]
        self.counters["steps"] += 1
        self.counters["rows_observed"] += count
        if self._thread is None:
            with torch.inference_mode():
                self._finish(_Job(number, step, rows, None, list(steered)))
        elif self._admit(count):
            copied = dataclasses.replace(
                step,
                positions=step.positions.to(torch.int32, copy=True),
                token_ids=step.token_ids.clone(),
            )
            rows = [layer_rows.clone() for layer_rows in rows]
            ready = torch.cuda.Event()
            ready.record()
            self._jobs.put(_Job(number, copied, rows, ready, list(steered)))
        elif steered:  # its features are lost, what a rule ends is not
            ready = torch.cuda.Event()
            ready.record()
            self._jobs.put(_Job(number, step, [], ready, list(steered)))
        self.counters["submit_us"] += _microseconds_since(began)

    def _admit(self, count: int) -> bool:
        with self._lock:
            if self._pending_rows + count > self._max_pending_rows:
                self.counters["rows_dropped"] += count
                return False
            self._pending_rows += count
            return True

    @torch.inference_mode()
    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            while True:
                job = self._jobs.get()
                self._finish(job)
                if job.rows:
                    with self._lock:
                        self._pending_rows -= job.step.num_rows

    def _finish(self, job: _Job) -> None:
        began = time.perf_counter()
        try:
            if job.ready is not None:
                torch.cuda.current_stream().wait_event(job.ready)
            steering = self._steering(job)
            if job.rows:
                self._send(self._encode(job, steering))
                self.counters["rows_encoded"] += job.step.num_rows
            self.failing = False
        except Exception:
            # The model goes on whatever happens here. The loss is counted, the first of a run is
            # logged, and the worker says that it is not armed.
            self.counters["rows_failed"] += job.step.num_rows
            if not self.failing:
                logger.exception("neuroscope: encoding a step failed")
            self.failing = True
        self.counters["encode_us"] += _microseconds_since(began)

    def _encode(self, job: _Job, steering: dict[str, Any]) -> wire.StepFeatures:
        columns = [
            encoder.encode(rows) for encoder, rows in zip(self._encoders, job.rows, strict=True)
        ]
        columns += [job.step.positions.int().unsqueeze(1), job.step.token_ids.int().unsqueeze(1)]
        packed = _to_host(torch.cat(columns, dim=1))
        layers, offset = [], 0
        for encoder in self._encoders:
            layers.append(encoder.message(packed[:, offset : offset + encoder.packed_width]))
            offset += encoder.packed_width
        bounds = itertools.pairwise(job.step.row_starts)
        spans = [
            wire.Span(request_id, start, stop)
            for request_id, (start, stop) in zip(job.step.request_ids, bounds, strict=True)
        ]
        host = packed.numpy()
        return wire.StepFeatures(
            engine=self._engine,
            spans=spans,
            positions=host[:, offset].tobytes(),
            token_ids=host[:, offset + 1].tobytes(),
            layers=layers,
            step=job.number,
            num_layers=self._num_layers,
            **steering,
        )

    def _steering(self, job: _Job) -> dict[str, Any]:
        """What was edited, and which rules were met; those that stop are noted."""
        steered: list[wire.SteeredRows] = []
        hits: list[wire.RuleHit] = []
        # One copy, as of the rows.
        parts = [part.found.flatten() for part in job.steered]
        flat = _to_host(torch.cat(parts)).numpy() if parts else np.empty(0, np.float32)
        at = 0
        for part in job.steered:
            found = flat[at : at + part.found.numel()].reshape(part.found.shape)
            at += part.found.numel()
            steered += steered_rows(part, found)
            met = rule_hits(part, found)
            for hit in met:
                if hit.stop:
                    self._stop(job.step.request_ids[part.span], hit.rule)
            hits += met
        return {"steered": steered, "hits": hits}


def device_name(device: torch.device) -> str:
    """As a worker tells it: the GPU's, else the kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _microseconds_since(began: float) -> int:
    return round((time.perf_counter() - began) * 1e6)


def _to_host(packed: Tensor) -> Tensor:
    if packed.device.type != "cuda":
        return packed.cpu()
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    # Waiting here, on our own thread and with the GIL released, holds up nobody.
    torch.cuda.current_stream().synchronize()
    return host
