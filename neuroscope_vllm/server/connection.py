"""Connections whose requests come too slowly, or do not end, or whose answers nobody takes, are
closed: uvicorn would wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from neuroscope_vllm.server.guard import MAX_CHAT, MAX_HEAD, Refusals

PATIENCE_S = 10.0
"""Also between two looks at an answer that is not taken."""
SLOWEST = 8192
"""Bytes a second that buy more time than PATIENCE_S."""
MAX_REQUEST = MAX_CHAT + (6 << 20)
"""What is read of a request at most, so that who sends too much still reads why not."""
MAX_PIPELINED = 64
"""Requests that wait for the answer to one before, as a stream is."""
MAX_AHEAD = MAX_PIPELINED * 4096
"""Bytes of them; neither a time limit nor MAX_HEAD holds for what comes meanwhile."""
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)

if TYPE_CHECKING:  # either of uvicorn's two; what is used here both have

    class _Base(asyncio.Protocol):
        transport: asyncio.Transport
        cycle: Any
        flow: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def on_headers_complete(self) -> None: ...
        def send_400_response(self, msg: str) -> None: ...
else:
    _Base = AutoHTTPProtocol


def impatient(refusals: Refusals) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with an end to its patience."""

    class Impatient(_Base):
        _timer: asyncio.TimerHandle | None = None
        _taking: asyncio.TimerHandle | None = None
        _untaken = 0
        _began = 0.0
        _received = 0
        _ahead = 0
        _unanswered: tuple[Any, ...] = ()

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._watch()
            self._taking = _later(PATIENCE_S, self._look_whether_taken)

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            if self._taking is not None:
                self._taking.cancel()
            super().connection_lost(exc)
            # uvicorn tells the one that came last; the one that is answered may be a stream, which
            # would go on for nobody.
            for cycle in self._unanswered:
                cycle.disconnected = True
                cycle.message_event.set()

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            before = (one for one in self._unanswered if not one.response_complete)
            self._unanswered = (*before, self.cycle)

        def data_received(self, data: bytes) -> None:
            self._watch()
            self._received += len(data)
            self._ahead = self._ahead + len(data) if self._answering else 0
            super().data_received(data)
            if self.transport.is_closing():
                return
            waiting = len(getattr(self, "pipeline", ()))  # h11 reads no further by itself
            if waiting > MAX_PIPELINED or self._ahead > MAX_AHEAD:
                self._refuse("pipelined")
            elif self._awaits_head and self._received > MAX_HEAD:
                self.transport.write(TOO_LARGE)
                self._refuse("heads")
            elif self._received > MAX_REQUEST:
                self._refuse("bodies")
            elif self._answering:
                self._rest()
                if waiting:
                    # uvicorn reads no further then, and would not see the client leave.
                    self.flow.resume_reading()

        def send_400_response(self, msg: str) -> None:
            self._count("malformed")
            super().send_400_response(msg)

        @property
        def _awaits_head(self) -> bool:
            """A request that was answered before its end may still send its body."""
            cycle = self.cycle
            return cycle is None or (cycle.response_complete and not cycle.more_body)

        @property
        def _answering(self) -> bool:
            """There is a whole request, and no whole answer."""
            return not self._awaits_head and not self.cycle.more_body

        def _watch(self) -> None:
            if self._timer is None:
                self._began, self._received = _now(), 0
                self._timer = _later(PATIENCE_S, self._look)

        def _rest(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _look(self) -> None:
            left = self._began + PATIENCE_S + self._received / SLOWEST - _now()
            if left > 0:
                self._timer = _later(left, self._look)
            else:
                self._refuse("slow")

        def _look_whether_taken(self) -> None:
            """While it is full or closing, nothing is added to what waits to be sent."""
            before, self._untaken = self._untaken, self.transport.get_write_buffer_size()
            waits = self.flow.write_paused or self.transport.is_closing()
            if waits and self._untaken >= before > 0:
                self._count("stuck")
                self.transport.abort()
            else:
                self._taking = _later(PATIENCE_S, self._look_whether_taken)

        def _refuse(self, kind: str) -> None:
            self._rest()
            self._count(kind)
            self.transport.close()

        def _count(self, kind: str) -> None:
            peer = self.transport.get_extra_info("peername") or ("?",)
            refusals.add(kind, str(peer[0]))

    return Impatient


def _now() -> float:
    return asyncio.get_running_loop().time()


def _later(delay: float, act: Callable[[], object]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(delay, act)
