"""Readers: cursors into the hub's logs.

A subscription belongs to one reader and is driven by it: `take` what is there, else `wait`. What
the reader missed comes as one gap event that says how much. The hub only wakes it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Protocol

import msgspec

from neuroscope_vllm.core import events
from neuroscope_vllm.server.rights import Rights
from neuroscope_vllm.server.traces import UNBOUNDED, Event, Log, Trace

SIBLING_GRACE_S = 0.5
"""After the last known choice of a request is done, how long another one may still begin."""

EventId = Callable[[int], bytes]


class Subscription(Protocol):
    ended: bool

    def take(self, limit: int, max_bytes: int = ...) -> list[Event]: ...
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
    """Everything that one may read from now on, or from after event `after` on."""

    def __init__(
        self,
        log: Log,
        event_id: EventId,
        counters: Counter[str],
        after: int | None,
        rights: Rights,
    ) -> None:
        super().__init__(event_id, counters)
        self._log = log
        self._rights = rights
        self._cursor = log.end if after is None else log.after(after)
        self._resuming = after is not None
        if after is not None and after + 1 < log.first:
            self._cursor = after + 1  # the gap tells how many are gone

    def take(self, limit: int, max_bytes: int = UNBOUNDED) -> list[Event]:
        log = self._log
        if self._cursor < log.first:
            reason = "evicted" if self._resuming else "slow_reader"
            self.tell_gap(reason, log.first - self._cursor, log.first - 1)
            self._cursor = log.first
        self._resuming = False
        batch: list[Event] = []
        while not batch and self._cursor < log.end:
            batch = log.read(self._cursor, limit, max_bytes)
            self._cursor += len(batch)
            if log.secret_events and not self._rights.everything:
                batch = [event for event in batch if self._may_read(event)]
        return self._taken(batch)

    def _may_read(self, event: Event) -> bool:
        return self._rights.may_read(event.trace.secret if event.trace else None)

    async def wait(self) -> None:
        await self._sleep(None)


class OneRequest(_Base):
    """All choices known under one id that one may read: replayed from their begin (or after event
    `after`), then live, until all are done. Waits for a request that has not begun."""

    def __init__(
        self, event_id: EventId, counters: Counter[str], after: int | None, rights: Rights
    ) -> None:
        super().__init__(event_id, counters)
        self._after = after
        self._rights = rights
        self._cursors: dict[Trace, int] = {}
        self._attached = False
        self._last_end = 0.0  # of those that were read to their end, and are forgotten

    def attach(self, trace: Trace) -> None:
        """Read a choice, too, if one may: somebody else's may bear the same id."""
        if not self._rights.may_read(trace.secret):
            return
        self._attached = True
        if self._after is None:
            self._cursors[trace] = 0
            return
        kept = trace.get(trace.first)
        lost = trace.first > 0 and kept is not None and self._after + 1 < kept.seq
        self._cursors[trace] = 0 if lost else trace.after(self._after)
        self.wake()

    def take(self, limit: int, max_bytes: int = UNBOUNDED) -> list[Event]:
        for trace, cursor in self._cursors.items():
            if cursor < trace.first:
                first = trace.get(trace.first)
                self.tell_gap("evicted", trace.first - cursor, first.seq - 1 if first else None)
                self._cursors[trace] = trace.first
        if len(self._cursors) == 1:
            [(trace, at)] = self._cursors.items()
            batch = trace.read(at, limit, max_bytes)
        else:
            batch = _merged(self._cursors, limit, max_bytes)
        for event in batch:
            assert event.trace is not None
            self._cursors[event.trace] = event.at + 1
        taken = self._taken(batch)
        self._forget_ended()
        if not taken and self._attached and self._grace_left() <= 0:
            self.ended = True
        return taken

    def _forget_ended(self) -> None:
        """A name may be used again and again, while this reader stays."""
        for trace, cursor in list(self._cursors.items()):
            if trace.finished_at is not None and cursor == trace.end:
                self._last_end = max(self._last_end, trace.finished_at)
                del self._cursors[trace]

    def _grace_left(self) -> float:
        """Seconds until this stream may end; infinite while a choice runs."""
        if self._cursors or not self._attached:
            return float("inf")
        return self._last_end + SIBLING_GRACE_S - time.monotonic()

    async def wait(self) -> None:
        left = self._grace_left()
        await self._sleep(None if left == float("inf") else max(left, 0.0))


def _merged(cursors: dict[Trace, int], limit: int, max_bytes: int) -> list[Event]:
    """The first events of several choices, as they were told. There may be thousands of choices:
    no more is looked at than is taken."""
    logs = (trace.follow(at) for trace, at in cursors.items())
    found, size = [], 0
    for event in islice(merge(*logs, key=attrgetter("seq")), limit):
        found.append(event)
        size += len(event.frame)
        if size >= max_bytes:
            break
    return found
