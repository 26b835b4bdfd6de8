"""All subscriptions of a hub: who is told of which request, and who is woken when."""

from __future__ import annotations

from neuroscope_vllm.server.subscribe import AllRequests, EventId, OneRequest
from neuroscope_vllm.server.traces import Log, Trace, TraceStore


class Readers:
    """Readers of everything, and readers by the name that they asked for."""

    def __init__(self, ring: Log, traces: TraceStore, event_id: EventId) -> None:
        self._ring = ring
        self._traces = traces
        self._event_id = event_id
        self._everything: set[AllRequests] = set()
        self._by_name: dict[str, set[OneRequest]] = {}
        self._touched: set[OneRequest] = set()
        self._wake_all = False

    def __len__(self) -> int:
        return len(self._everything) + sum(map(len, self._by_name.values()))

    def subscribe_all(self, after: int | None) -> AllRequests:
        reader = AllRequests(self._ring, self._event_id, after)
        self._everything.add(reader)
        return reader

    def subscribe(self, name: str, after: int | None) -> OneRequest:
        reader = OneRequest(self._event_id, after)
        for trace in self._traces.find(name):
            reader.attach(trace)
        self._by_name.setdefault(name, set()).add(reader)
        return reader

    def unsubscribe(self, reader: AllRequests | OneRequest, name: str | None) -> None:
        if isinstance(reader, AllRequests):
            self._everything.discard(reader)
            return
        assert name is not None
        readers = self._by_name.get(name, set())
        readers.discard(reader)
        if not readers:
            self._by_name.pop(name, None)

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
