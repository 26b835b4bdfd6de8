"""Recorded events in the order in which they were told, of any number of requests at once."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from neuroscope_vllm.core.recording.files import Place, Recording
from neuroscope_vllm.core.recording.record import Head, RecordedEvent

IDLE_S = 1.0
"""Longer pauses in which nothing ran are cut to this."""


class Told(NamedTuple):
    """An event of one of the traces.

    Attributes:
        trace: Which of the places.
        due: When it is told, in seconds from the first one.
    """

    trace: int
    due: float
    head: Head
    event: RecordedEvent


def timeline(recording: Recording, places: Sequence[Place]) -> Iterator[Told]:
    """The events of traces, by when they were told; at once where nobody noted that.

    Only the traces that run at a time are in memory. Raises ConfigError.

    Args:
        places: By when they began, as `Recording.places`.
    """
    waiting = deque(enumerate(places))
    running: list[tuple[float, str, int, int]] = []  # time, epoch, seq: unique but for copies
    told: dict[int, Iterator[RecordedEvent]] = {}
    heads: dict[int, tuple[Head, RecordedEvent]] = {}
    due, clock = 0.0, None

    def advance(number: int, head: Head) -> None:
        event = next(told[number], None)
        if event is None:
            del told[number], heads[number]
            return
        heads[number] = (head, event)
        time = head.began if event.time is None else event.time
        heapq.heappush(running, (time, event.epoch, event.seq, number))

    while waiting or running:
        while waiting and (not running or waiting[0][1].head.began <= running[0][0]):
            number, place = waiting.popleft()
            idle = not running
            told[number] = iter(recording.read(place).events)
            advance(number, place.head)
            if idle and clock is not None and running:
                clock = max(clock, running[0][0] - IDLE_S)
        if not running:
            continue
        time, _, _, number = heapq.heappop(running)
        due += max(0.0, time - clock) if clock is not None else 0.0
        clock = time if clock is None else max(clock, time)
        head, event = heads[number]
        yield Told(number, due, head, event)
        advance(number, head)
