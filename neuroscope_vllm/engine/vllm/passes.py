"""The worker's half of a corpus pass: rows of every step to the gatherers, and nowhere else.

Gathered on the runner's thread: a pass must not lose rows, so the model waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from neuroscope_vllm.core.passes import Gatherer, Pass, Rows
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.engine.serving.step import StepView

BEGIN_RPC, END_RPC = "neuroscope_begin_pass", "neuroscope_end_pass"


@dataclass(frozen=True, slots=True)
class Site:
    """An observed layer: the hook's buffer [max_rows, d_model], and its SAE on that device."""

    layer: int
    rows: Tensor
    sae: SAE


class PassRunner:
    """Feeds the gatherers of one pass at a time.

    Sequences are requests whose ids begin with their number, as `vllm.LLM` numbers them through;
    the first of a pass is in its first step.
    """

    def __init__(self, sites: list[Site]) -> None:
        self._sites = sites
        self._gatherers: list[Gatherer] = []
        self._next: dict[str, int] = {}  # position up to which a request's rows were seen
        self._num_rows = 0
        self._first: int | None = None  # number of the pass's first sequence

    def begin(self, what: bytes) -> None:
        decoded = msgspec.msgpack.decode(what, type=Pass)
        self._next, self._num_rows, self._first = {}, 0, None
        self._gatherers = [decoded.gather(site.layer, site.sae) for site in self._sites]

    @torch.inference_mode()
    def on_step(self, step: StepView) -> None:
        if not self._gatherers:
            return
        positions, token_ids = step.positions.cpu().long(), step.token_ids.cpu().long()
        sequence = torch.empty_like(positions)
        new = torch.zeros_like(positions, dtype=torch.bool)
        numbers = [int(request_id.partition("-")[0]) for request_id in step.request_ids]
        if self._first is None:
            self._first = min(numbers)
        for i, request_id in enumerate(step.request_ids):
            start, stop = step.row_starts[i], step.row_starts[i + 1]
            # A preempted request runs its rows again.
            seen = self._next.get(request_id, 0)
            new[start:stop] = positions[start:stop] >= seen
            sequence[start:stop] = numbers[i] - self._first
            self._next[request_id] = max(seen, int(positions[stop - 1]) + 1)
        self._num_rows += int(new.sum())
        for site, gatherer in zip(self._sites, self._gatherers, strict=True):
            residual = site.rows[: step.num_rows][new.to(site.rows.device)]
            gatherer.add(Rows(sequence[new], positions[new], token_ids[new], residual))

    def end(self) -> tuple[int, dict[int, bytes]]:
        """How many rows were seen, and the result of each layer that this worker observes."""
        found = {
            site.layer: gatherer.result()
            for site, gatherer in zip(self._sites, self._gatherers, strict=True)
        }
        self._gatherers = []
        return self._num_rows, found
