"""Puts together what pipeline stages say of one step.

Stages that own different observed layers send a message each; a reader should get a token's
layers together. Engines with one observing stage pass straight through.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from neuroscope_vllm.core import wire

WAIT_S = 1.0
"""How long a step waits for its other stages."""
WAITING_STEPS = 64


@dataclass(slots=True)
class _Partial:
    since: float
    message: wire.StepFeatures


class Stages:
    """Steps in order, whole where all their stages spoke."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[int, _Partial]] = {}  # by engine and step

    def add(self, message: wire.StepFeatures, now: float) -> list[wire.StepFeatures]:
        """The messages that are ready now. One that stayed incomplete comes without its missing
        layers, before the first later one that is complete.

        Raises ValueError if two stages do not speak of the same rows.
        """
        if len(message.layers) >= message.num_layers:
            return [message]
        waiting = self._waiting.setdefault(message.engine, {})
        partial = waiting.get(message.step)
        if partial is None:
            waiting[message.step] = _Partial(now, message)
            return self._take(waiting, len(waiting) - WAITING_STEPS)
        partial.message = _merged(partial.message, message)
        if len(partial.message.layers) < message.num_layers:
            return []
        return self._take(waiting, 1 + sorted(waiting).index(message.step))

    def tick(self, now: float) -> list[wire.StepFeatures]:
        """Steps whose other stages will not speak any more."""
        ready: list[wire.StepFeatures] = []
        for waiting in self._waiting.values():
            late = [step for step, partial in waiting.items() if now - partial.since > WAIT_S]
            if late:
                ready += self._take(waiting, 1 + sorted(waiting).index(max(late)))
        return ready

    @staticmethod
    def _take(waiting: dict[int, _Partial], count: int) -> list[wire.StepFeatures]:
        """The oldest `count` steps."""
        return [waiting.pop(step).message for step in sorted(waiting)[: max(count, 0)]]


def _merged(one: wire.StepFeatures, other: wire.StepFeatures) -> wire.StepFeatures:
    if (one.positions, one.token_ids) != (other.positions, other.token_ids):
        raise ValueError(f"pipeline stages disagree about the rows of step {one.step}")
    return msgspec.structs.replace(
        one,
        layers=[*one.layers, *other.layers],
        steered=[*one.steered, *other.steered],
        hits=[*one.hits, *other.hits],
    )
