"""Puts together what pipeline stages say of one step.

Stages that own different observed layers send a message each; a reader should get a token's
layers together. Engines with one observing stage pass straight through.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import msgspec

from neuroscope_vllm.core import wire
from neuroscope_vllm.server.join import Budget

WAIT_S = 1.0
"""How long a step waits for its other stages."""
WAITING_STEPS = 64
"""Of an engine."""
WAITING_SHARE = 0.25
"""Of `running_mb`, for all engines."""
MAX_LAYERS = 1024
"""More than any model has."""
OVERHEAD_BYTES = 2000
"""What surrounds the arrays of a message."""


@dataclass(slots=True)
class _Partial:
    since: float
    message: wire.StepFeatures
    bytes: int


class Stages:
    """Steps in order, whole where all their stages spoke; `steps_incomplete` counts the others."""

    def __init__(self, budget: Budget, counters: Counter[str]) -> None:
        self._budget = budget
        self._counters = counters
        self._waiting: dict[str, dict[int, _Partial]] = {}  # by engine and step
        self._bytes = 0

    def add(self, message: wire.StepFeatures, now: float) -> list[wire.StepFeatures]:
        """The messages that are ready now. One that stayed incomplete comes without its missing
        layers, before the first later one that is complete.

        Raises ValueError if two stages do not speak of the same rows, or both of one layer.
        """
        _check_layers(message)
        if len(message.layers) >= message.num_layers:
            return [message]
        waiting = self._waiting.setdefault(message.engine, {})
        partial = waiting.get(message.step)
        if partial is None:
            waiting[message.step] = partial = _Partial(now, message, 0)
        else:
            partial.message = _merged(partial.message, message)
        size = wire.weight(message) + OVERHEAD_BYTES
        partial.bytes += size
        self._grow(size)
        if len(partial.message.layers) >= message.num_layers:
            ready = 1 + sorted(waiting).index(message.step)
        elif self._budget.exceeded or self._bytes > self._budget.limit * WAITING_SHARE:
            ready = len(waiting)
        else:
            ready = len(waiting) - WAITING_STEPS
        return self._take(message.engine, ready)

    def tick(self, now: float) -> list[wire.StepFeatures]:
        """Steps whose other stages will not speak any more."""
        ready: list[wire.StepFeatures] = []
        for engine, waiting in list(self._waiting.items()):
            late = [step for step, partial in waiting.items() if now - partial.since > WAIT_S]
            if late:
                ready += self._take(engine, 1 + sorted(waiting).index(max(late)))
        return ready

    def _take(self, engine: str, count: int) -> list[wire.StepFeatures]:
        """The oldest `count` steps."""
        waiting = self._waiting[engine]
        taken = [waiting.pop(step) for step in sorted(waiting)[: max(count, 0)]]
        self._grow(-sum(partial.bytes for partial in taken))
        if not waiting:
            del self._waiting[engine]
        messages = [partial.message for partial in taken]
        for message in messages:
            self._counters["steps_incomplete"] += len(message.layers) < message.num_layers
        return messages

    def _grow(self, size: int) -> None:
        self._bytes += size
        self._budget.rows += size


def _merged(one: wire.StepFeatures, other: wire.StepFeatures) -> wire.StepFeatures:
    if (one.positions, one.token_ids) != (other.positions, other.token_ids):
        raise ValueError(f"pipeline stages disagree about the rows of step {one.step}")
    both = msgspec.structs.replace(
        one,
        layers=[*one.layers, *other.layers],
        steered=[*one.steered, *other.steered],
        hits=[*one.hits, *other.hits],
    )
    _check_layers(both)
    return both


def _check_layers(message: wire.StepFeatures) -> None:
    layers = {one.layer for one in message.layers}
    if not len(layers) == len(message.layers) <= message.num_layers <= MAX_LAYERS:
        told = f"{len(message.layers)} of {message.num_layers} layers"
        raise ValueError(f"step {message.step} tells {told}, {len(layers)} of them different ones")
