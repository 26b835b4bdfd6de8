"""Kept events: one log per choice, one for everything, both bounded in bytes.

Readers hold cursors into these logs, not queues of their own: a reader costs no memory, ingest
never touches a reader's backlog, and being slow means that a cursor falls off the old end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from neuroscope_vllm.core.recording.record import aliases
from neuroscope_vllm.server.rights import ALL, Rights

UNBOUNDED = 1 << 62
EVENT_OVERHEAD_BYTES = 400
"""Python objects around one kept event, measured generously."""


class Event(msgspec.Struct, gc=False, eq=False):
    """One encoded event. `frame` is its SSE form; the JSON lies in [body:-2] of it.

    Hundreds of thousands are kept, so the garbage collector is told not to walk them (100 ms a
    pass); what they refer to is released by `drop_oldest` and `drop_all`.
    """

    seq: int
    name: str
    layer: int | None
    frame: bytes
    body: int
    trace: Trace | None
    size: int
    """Bytes that it takes in memory."""
    is_secret: bool
    """It is of a request with a stream secret."""
    at: int = -1
    """Index in the trace."""

    @staticmethod
    def make(
        seq: int, name: str, layer: int | None, id_: bytes | None, json: bytes, trace: Trace | None
    ) -> Event:
        head = b"event: %b\ndata: " % name.encode()
        if id_ is not None:
            head = b"id: %b\n%b" % (id_, head)
        frame = b"%b%b\n\n" % (head, json)
        secret = trace is not None and trace.secret is not None
        size = len(frame) + EVENT_OVERHEAD_BYTES
        return Event(seq, name, layer, frame, len(head), trace, size, secret)

    @property
    def json(self) -> bytes:
        return self.frame[self.body : -2]

    @property
    def id(self) -> bytes | None:
        """`<epoch>-<seq>`; None for events that only one reader got."""
        frame = self.frame
        return frame[4 : frame.index(b"\n")] if frame.startswith(b"id: ") else None


class Log:
    """Events by index, counted from 0; the oldest can be dropped.

    Attributes:
        secret_events: How many of those kept are of requests with a stream secret.
    """

    def __init__(self) -> None:
        self.first = 0
        self.end = 0
        self.bytes = 0
        self.secret_events = 0
        self._events: dict[int, Event] = {}

    def append(self, event: Event) -> None:
        self._events[self.end] = event
        self.end += 1
        self.bytes += event.size
        self.secret_events += event.is_secret

    def drop_oldest(self) -> None:
        event = self._events.pop(self.first)
        self.first += 1
        self.bytes -= event.size
        self.secret_events -= event.is_secret

    def drop_all(self) -> None:
        self._events.clear()
        self.first = self.end
        self.bytes = self.secret_events = 0

    def read(self, cursor: int, limit: int, max_bytes: int = UNBOUNDED) -> list[Event]:
        """Up to `limit` events from `cursor` on, which must not lie before `first`; none after
        the one that makes them `max_bytes`."""
        events, found, size = self._events, [], 0
        for at in range(cursor, min(self.end, cursor + limit)):
            found.append(events[at])
            size += len(events[at].frame)
            if size >= max_bytes:
                break
        return found

    def follow(self, cursor: int) -> Iterator[Event]:
        """All from `cursor` on, which must not lie before `first`."""
        return (self._events[at] for at in range(cursor, self.end))

    def get(self, at: int) -> Event | None:
        return self._events.get(at)

    def after(self, seq: int) -> int:
        """Index of the first kept event with a higher sequence number."""
        low, high = self.first, self.end
        while low < high:
            middle = (low + high) // 2
            if self._events[middle].seq <= seq:
                low = middle + 1
            else:
                high = middle
        return low


class Trace(Log):
    """All events of one choice. `secret`: the digest of its stream secret, if it has one."""

    def __init__(
        self,
        internal_id: str,
        request_id: str,
        choice: int,
        created: float,
        secret: bytes | None = None,
    ) -> None:
        super().__init__()
        self.internal_id = internal_id
        self.request_id = request_id
        self.choice = choice
        self.created = created
        self.secret = secret
        self.finished_at: float | None = None
        self.aliases = aliases(request_id, internal_id)


class TraceStore:
    """Traces by any of their ids, within a ceiling in bytes and in finished requests."""

    def __init__(self, max_bytes: int, max_finished: int) -> None:
        self.bytes = 0
        self.evicted = 0
        self._max_bytes = max_bytes
        self._max_finished = max_finished
        self._active: OrderedDict[str, Trace] = OrderedDict()
        self._finished: OrderedDict[str, Trace] = OrderedDict()
        self._by_alias: dict[str, dict[str, Trace]] = {}

    def __iter__(self) -> Iterator[Trace]:
        yield from self._finished.values()
        yield from self._active.values()

    def __len__(self) -> int:
        return len(self._active) + len(self._finished)

    def open(self, trace: Trace) -> None:
        for kept in (self._finished, self._active):
            if before := kept.get(trace.internal_id):
                self._evict(before)
        self._active[trace.internal_id] = trace
        for name in trace.aliases:
            self._by_alias.setdefault(name, {})[trace.internal_id] = trace

    def find(self, name: str, rights: Rights = ALL) -> list[Trace]:
        """Traces of any id that one may read; being asked for keeps a finished one longer."""
        named = self._by_alias.get(name, {}).values()
        found = [trace for trace in named if rights.may_read(trace.secret)]
        for trace in found:
            if trace.internal_id in self._finished:
                self._finished.move_to_end(trace.internal_id)
        return found

    def append(self, trace: Trace, event: Event) -> None:
        event.at = trace.end
        trace.append(event)
        self.bytes += event.size
        while self.bytes > self._max_bytes:
            self._make_room()

    def finish(self, trace: Trace, now: float) -> None:
        trace.finished_at = now
        self._active.pop(trace.internal_id, None)
        self._finished[trace.internal_id] = trace
        while len(self._finished) > self._max_finished:
            self._evict(next(iter(self._finished.values())))

    def _make_room(self) -> None:
        """Give up the finished request least recently asked for, else the oldest half of the
        oldest request that still runs (its readers are told)."""
        if self._finished:
            self._evict(next(iter(self._finished.values())))
            return
        trace = next(trace for trace in self._active.values() if trace.first < trace.end)
        for _ in range((trace.end - trace.first + 1) // 2):
            before = trace.bytes
            trace.drop_oldest()
            self.bytes -= before - trace.bytes

    def _evict(self, trace: Trace) -> None:
        self.evicted += 1
        for kept in (self._finished, self._active):
            kept.pop(trace.internal_id, None)
        for name in trace.aliases:
            del self._by_alias[name][trace.internal_id]
            if not self._by_alias[name]:
                del self._by_alias[name]
        self.bytes -= trace.bytes
        trace.drop_all()
