"""Readers: cursors into the hub's logs.

A subscription belongs to one reader and is driven by it: `take` what is there, else `wait`. What
the reader missed comes as one gap event that says how much. The hub only wakes it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import msgspec

from neuroscope_vllm.core import events
from neuroscope_vllm.server.traces import Event, Log, Trace

SIBLING_GRACE_S = 0.5
"""After the last known choice of a request is done, how long another one may still begin."""

EventId = Callable[[int], bytes]


class Subscription(Protocol):
    ended: bool

    def take(self, limit: int) -> list[Event]: ...
    async def wait(self) -> None: ...


class _Base:
    """What both kinds share: waking up, and events for this reader alone."""

    def __init__(self, event_id: EventId, counters: Counter[str]) -> None:
        self.ended = False
        self._counters = counters
        self._event_id = event_id
        self._wake = asyncio.Event()
        self._own: list[Event] = []
        self.closing = False

    def wake(self) -> None:
        self._wake.set()

    def close(self, reason: str) -> None:
        """Say goodbye after what is already there, and end."""
        self.closing = True
        self._farewell = self._make("goodbye", events.GoodbyeEvent(reason), None)
        self.wake()

    def tell_gap(self, reason: events.GapReason, count: int | None, last_lost: int | None) -> None:
        """`last_lost` is the sequence number after which a resuming reader goes on."""
        self._counters[f"gaps_{reason}"] += 1
        self._counters[f"events_{reason}"] += count or 0
        self._own.append(self._make("gap", events.GapEvent(reason, count=count), last_lost))

    def _make(self, name: str, event: msgspec.Struct, seq: int | None) -> Event:
        id_ = None if seq is None else self._event_id(seq)
        return Event.make(seq or 0, name, None, id_, events.encoder.encode(event), None)

    def _taken(self, batch: list[Event]) -> list[Event]:
        own, self._own = self._own, []
        if not batch and self.closing and not self.ended:
            own.append(self._farewell)
            self.ended = True
        return own + batch

    async def _sleep(self, timeout: float | None) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), timeout)
        except TimeoutError:
            return
        self._wake.clear()


class AllRequests(_Base):
    """Everything from now on, or from after event `after` on."""

    def __init__(
        self, log: Log, event_id: EventId, counters: Counter[str], after: int | None
    ) -> None:
        super().__init__(event_id, counters)
        self._log = log
        self._cursor = log.end if after is None else log.after(after)
        self._resuming = after is not None
        if after is not None and after + 1 < log.first:
            self._cursor = after + 1  # the gap tells how many are gone

    def take(self, limit: int) -> list[Event]:
        log = self._log
        if self._cursor < log.first:
            reason = "evicted" if self._resuming else "slow_reader"
            self.tell_gap(reason, log.first - self._cursor, log.first - 1)
            self._cursor = log.first
        self._resuming = False
        batch = log.read(self._cursor, limit)
        self._cursor += len(batch)
        return self._taken(batch)

    async def wait(self) -> None:
        await self._sleep(None)


class OneRequest(_Base):
    """All choices known under one id: replayed from their begin (or after event `after`), then
    live, until all are done. Waits for a request that has not begun."""

    def __init__(self, event_id: EventId, counters: Counter[str], after: int | None) -> None:
        super().__init__(event_id, counters)
        self._after = after
        self._cursors: dict[Trace, int] = {}

    def attach(self, trace: Trace) -> None:
        if self._after is None:
            self._cursors[trace] = 0
            return
        kept = trace.get(trace.first)
        lost = trace.first > 0 and kept is not None and self._after + 1 < kept.seq
        self._cursors[trace] = 0 if lost else trace.after(self._after)
        self.wake()

    def take(self, limit: int) -> list[Event]:
        for trace, cursor in self._cursors.items():
            if cursor < trace.first:
                first = trace.get(trace.first)
                self.tell_gap("evicted", trace.first - cursor, first.seq - 1 if first else None)
                self._cursors[trace] = trace.first
        slices = {trace: trace.read(at, limit) for trace, at in self._cursors.items()}
        batch = [event for taken in slices.values() for event in taken]
        if len(slices) > 1:
            batch = sorted(batch, key=lambda event: event.seq)[:limit]
        for event in batch:
            assert event.trace is not None
            self._cursors[event.trace] = event.at + 1
        taken = self._taken(batch)
        if not taken and self._cursors and self._grace_left() <= 0:
            self.ended = True
        return taken

    def _grace_left(self) -> float:
        """Seconds until this stream may end; infinite while a choice runs."""
        finished = [trace.finished_at for trace in self._cursors]
        last = max(
            (at if at is not None else float("inf") for at in finished), default=float("inf")
        )
        return last + SIBLING_GRACE_S - time.monotonic()

    async def wait(self) -> None:
        left = self._grace_left()
        await self._sleep(None if left == float("inf") else max(left, 0.0))
