"""All subscriptions of a hub: who is told of which request, and who is woken when."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from neuroscope_vllm.server.rights import ALL, Rights
from neuroscope_vllm.server.subscribe import AllRequests, EventId, OneRequest
from neuroscope_vllm.server.traces import Log, Trace, TraceStore

SHARE = 4
"""A caller that is no admin may have a quarter of the places."""


class TooManyReaders(Exception):
    """As many as the settings allow are there."""


class TooManyOfOne(TooManyReaders):
    """As many as one caller may have are there."""


class Readers:
    """Readers of everything, and readers by the name that they asked for, `limit` together.

    So this also bounds the names that are waited for. `subscribe_all`, `subscribe` and `place`
    raise TooManyReaders, which is counted in `readers_refused`, or TooManyOfOne, counted in
    `readers_of_one_key_refused`: those of the same `Rights.who` together may be a quarter.
    """

    def __init__(
        self,
        ring: Log,
        traces: TraceStore,
        event_id: EventId,
        limit: int,
        counters: Counter[str],
    ) -> None:
        self._limit = limit
        self._share = max(1, limit // SHARE)
        self._counters = counters
        self._whose: dict[object, bytes | None] = {}
        self._ring = ring
        self._traces = traces
        self._event_id = event_id
        self._everything: set[AllRequests] = set()
        self._by_name: dict[str, set[OneRequest]] = {}
        self._touched: set[OneRequest] = set()
        self._wake_all = False

    def __len__(self) -> int:
        return len(self._whose)

    @property
    def of_one(self) -> int:
        """Those of one request: its stream, or all that is kept of it."""
        return sum(not isinstance(reader, AllRequests) for reader in self._whose)

    def follow(self) -> AllRequests:
        """For what belongs to this process, as a recording: it takes nobody's place, and gets in
        where there is none left."""
        reader = AllRequests(self._ring, self._event_id, self._counters, None, ALL)
        self._everything.add(reader)
        return reader

    def subscribe_all(self, after: int | None, rights: Rights) -> AllRequests:
        self._admit(rights.who)
        reader = AllRequests(self._ring, self._event_id, self._counters, after, rights)
        self._whose[reader] = rights.who
        self._everything.add(reader)
        return reader

    def subscribe(self, name: str, after: int | None, rights: Rights) -> OneRequest:
        self._admit(rights.who)
        reader = OneRequest(self._event_id, self._counters, after, rights)
        self._whose[reader] = rights.who
        for trace in self._traces.find(name, rights):
            reader.attach(trace)
        self._by_name.setdefault(name, set()).add(reader)
        return reader

    @contextlib.contextmanager
    def place(self, rights: Rights) -> Iterator[None]:
        """A reader's place, for who fetches something long."""
        self._admit(rights.who)
        taken = object()
        self._whose[taken] = rights.who
        try:
            yield
        finally:
            del self._whose[taken]

    def unsubscribe(self, reader: AllRequests | OneRequest, name: str | None) -> None:
        if isinstance(reader, AllRequests):
            self._whose.pop(reader, None)
            self._everything.remove(reader)
            return
        del self._whose[reader]
        assert name is not None
        readers = self._by_name[name]
        readers.remove(reader)
        if not readers:
            del self._by_name[name]

    def _admit(self, who: bytes | None) -> None:
        if len(self) >= self._limit:
            self._counters["readers_refused"] += 1
            raise TooManyReaders
        if who is not None and list(self._whose.values()).count(who) >= self._share:
            self._counters["readers_of_one_key_refused"] += 1
            raise TooManyOfOne

    def attach(self, trace: Trace) -> None:
        """Give a trace that begins to those who wait for it."""
        for name in trace.aliases:
            for reader in self._by_name.get(name, ()):
                reader.attach(trace)

    def touch(self, trace: Trace) -> None:
        """There is something new in a trace; `wake` tells."""
        self._wake_all = True
        for name in trace.aliases:
            if readers := self._by_name.get(name):
                self._touched |= readers

    def wake(self) -> None:
        if self._wake_all:
            for reader in self._everything:
                reader.wake()
            self._wake_all = False
        if self._touched:
            for reader in self._touched:
                reader.wake()
            self._touched.clear()

    def close(self, reason: str) -> None:
        """Say goodbye to every one."""
        for reader in [
            *self._everything,
            *(one for many in self._by_name.values() for one in many),
        ]:
            reader.close(reason)
