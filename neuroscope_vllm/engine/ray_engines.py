"""Many engines as one: an `Engine` over Ray workers, each with an engine of its own.

A chunk runs whole on one worker, and results come in the order of the chunks, so what they add up
to is what one engine would have made of them. A worker that dies is replaced, and the chunks it was
given run again; a result counts once it is here. Ray's own restarts are not used: they go on for
ever where a worker runs out of memory or finds no host, and blame chunks that only waited.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from neuroscope_vllm.core.errors import EngineError, NeuroscopeError
from neuroscope_vllm.engine.ray_cluster import connect, first_line, plan, sent_environment
from neuroscope_vllm.engine.ray_worker import RayWorker, Share, check_agrees
from neuroscope_vllm.engine.spec import EngineSpec

if TYPE_CHECKING:
    from neuroscope_vllm.core.passes import Pass
    from neuroscope_vllm.engine.protocol import Chunk

logger = logging.getLogger(__name__)

QUEUED = 2
"""Chunks a worker has: one that runs, and the next."""
AHEAD = 4
"""Chunks a worker that are given out at most, results that wait for an earlier one included."""
DEATHS = 3
"""Workers that a chunk may take along."""
PLACED_S = 60.0
"""How long Ray may take to start a worker's process. The engine is loaded later."""


@dataclass(slots=True)
class _Task:
    number: int
    what: Pass
    chunk: Chunk
    ref: Any = None
    deaths: int = 0


@dataclass(slots=True)
class _Worker:
    actor: Any
    share: Share | None = None
    tasks: deque[_Task] = field(default_factory=deque)


class RayEngines:
    """See `engine.protocol.Engine`."""

    def __init__(
        self, spec: EngineSpec, *, address: str | None = None, workers: int | None = None
    ) -> None:
        """
        Args:
            spec: The engine of each worker; paths must lead to the same files on every host.
            address: Of the cluster; see `ray_cluster.connect`.
            workers: How many; see `ray_cluster.plan`.

        Raises:
            ConfigError: Ray is not installed, so many workers do not fit the cluster, or their
                engines are not alike.
            EngineError: Ray or an engine did not start.
            SAEError, DownloadError: As the engine's.
        """
        self._spec = spec
        self._workers: list[_Worker] = []
        self._ray, self._connected = connect(address)
        try:
            self._start(workers)
        except BaseException:
            self.close()
            raise

    def run(self, what: Pass, sequences: Chunk) -> dict[int, bytes]:
        (result,) = self.run_each(lambda: what, [sequences])
        return result

    def run_each(
        self, what: Callable[[], Pass], chunks: Iterable[Chunk]
    ) -> Iterator[dict[int, bytes]]:
        """See `engine.protocol.Engine.run_each`.

        Raises:
            EngineError: An engine failed, or workers die again and again, on a chunk; given once
                the results of all chunks before it were.
        """
        for worker in self._workers:
            worker.tasks.clear()  # of a run that was given up
        todo = enumerate(chunks, start=1)
        done: dict[int, dict[int, bytes] | NeuroscopeError] = {}
        given, wanted = 0, 1
        while True:
            while given - wanted + 1 < AHEAD * len(self._workers):
                worker = min(self._workers, key=lambda worker: len(worker.tasks))
                if len(worker.tasks) == QUEUED or (numbered := next(todo, None)) is None:
                    break
                given, chunk = numbered
                self._give(worker, _Task(given, what(), chunk))
            if wanted > given:
                return
            task, result = self._next_result()
            done[task.number] = result
            if isinstance(result, NeuroscopeError):
                todo, given = iter(()), task.number
                for worker in self._workers:
                    worker.tasks = deque(t for t in worker.tasks if t.number < task.number)
            while wanted in done:
                result = done.pop(wanted)
                if isinstance(result, NeuroscopeError):
                    raise result
                wanted += 1
                yield result

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []
        if self._connected:
            self._ray.shutdown()

    def _start(self, workers: int | None) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._plan = plan(self._spec, workers, nodes)
        self._workers = [_Worker(self._hire()) for _ in range(self._plan.workers)]
        hosts = self._hosts([worker.actor for worker in self._workers])
        if not self._plan.gpus:
            by_host = sorted(range(len(hosts)), key=hosts.__getitem__)
            for _, group in groupby(by_host, key=hosts.__getitem__):
                numbers = list(group)
                for rank, number in enumerate(numbers):
                    share = Share(rank=rank, workers=len(numbers), parts=self._plan.parts)
                    self._place(self._workers[number], share)
        try:
            reports = self._ray.get([worker.actor.open.remote() for worker in self._workers])
        except self._ray.exceptions.RayTaskError as error:
            raise _own(error, "a Ray worker could not open its engine") from None
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                f"a Ray worker died while it opened its engine ({first_line(error)}); the usual"
                " reason is memory, so ask for fewer with --workers."
            ) from error
        self._agreed = reports[0]
        for host, found in zip(hosts, reports, strict=True):
            check_agrees(host, found, self._agreed)
        try:
            self.tokenizer: Any = self._ray.get(self._workers[0].actor.tokenizer.remote())
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                f"the model's tokenizer could not be brought here ({first_line(error)}); install"
                " here what the Ray workers have."
            ) from error
        self.model = self._spec.model
        self.identity: str = self._agreed.identity
        self.sites = self._agreed.sites
        self.sae_input: str = self._agreed.sae_input
        self.max_tokens: int = self._agreed.max_tokens

    def _hire(self) -> Any:
        """A new worker process, which has not opened its engine."""
        hired = self._ray.remote(RayWorker).options(
            num_cpus=self._plan.cpus, num_gpus=self._plan.gpus, max_restarts=0
        )
        return hired.remote(self._spec, sent_environment(), os.getcwd())

    def _hosts(self, actors: list[Any]) -> list[str]:
        """Where new workers are, once all are somewhere."""
        asked = [actor.host.remote() for actor in actors]
        _, waiting = self._ray.wait(asked, num_returns=len(asked), timeout=PLACED_S)
        if waiting:
            kind = f"{self._plan.gpus} GPUs" if self._plan.gpus else f"{self._plan.cpus} cores"
            raise EngineError(
                f"Ray found no place for {len(waiting)} of {self._plan.workers} workers of {kind}"
                f" in {PLACED_S:.0f} s; others use the cluster (see `ray status`), so wait for"
                " them, or ask for fewer with --workers."
            )
        try:
            return self._ray.get(asked)
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                f"a Ray worker did not start ({str(error).strip().splitlines()[-1]}); install the"
                " same neuroscope-vllm on all hosts."
            ) from error

    def _place(self, worker: _Worker, share: Share | None) -> None:
        worker.share = share
        if share is not None:
            worker.actor.place.remote(share)

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.tasks.append(task)
        self._send(worker, task)

    def _send(self, worker: _Worker, task: _Task) -> None:
        task.ref = worker.actor.run.remote(self._agreed, task.what, task.chunk)

    def _next_result(self) -> tuple[_Task, dict[int, bytes] | NeuroscopeError]:
        """Of whichever worker is done first; the dead are replaced meanwhile."""
        exceptions = self._ray.exceptions
        while True:
            first = {worker.tasks[0].ref: worker for worker in self._workers if worker.tasks}
            (ref,), _ = self._ray.wait(list(first), num_returns=1)
            worker = first[ref]
            task = worker.tasks[0]
            try:
                result = self._ray.get(ref)
            except exceptions.RayTaskError as error:
                result = _own(error, f"a Ray worker failed on {_name(task)}")
            except exceptions.RayError as error:
                task.deaths += 1
                if task.deaths < DEATHS:
                    logger.warning(
                        "neuroscope: a Ray worker died on %s; another takes it over", _name(task)
                    )
                    self._replace(worker)
                    continue
                result = EngineError(
                    f"{DEATHS} Ray workers died on {_name(task)}, the last so: {first_line(error)};"
                    " the usual reason is memory, so ask for fewer with --workers."
                )
            worker.tasks.popleft()
            return task, result

    def _replace(self, worker: _Worker) -> None:
        self._ray.kill(worker.actor)  # it may be alive, and only out of reach
        worker.actor = self._hire()
        self._hosts([worker.actor])
        self._place(worker, worker.share)
        for task in worker.tasks:
            self._send(worker, task)


def _own(error: Any, what: str) -> NeuroscopeError:
    """The error of ours that a worker raised, as it raised it."""
    cause = error.cause
    if isinstance(cause, NeuroscopeError):
        return cause
    return EngineError(f"{what} ({type(cause).__name__}: {first_line(cause)}).")


def _name(task: _Task) -> str:
    start = ", ".join(map(str, task.chunk[0][:8]))
    return (
        f"chunk {task.number} of this run ({len(task.chunk)} sequences, the first begins with"
        f" tokens {start})"
    )
