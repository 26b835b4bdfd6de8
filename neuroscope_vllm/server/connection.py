"""Connections whose requests come too slowly, or do not end, are closed: uvicorn would wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from neuroscope_vllm.server.guard import MAX_CHAT, MAX_HEAD, Refusals

PATIENCE_S = 10.0
SLOWEST = 8192
"""Bytes a second that buy more time than PATIENCE_S."""
MAX_REQUEST = MAX_CHAT + (6 << 20)
"""What is read of a request at most, so that who sends too much still reads why not."""
MAX_PIPELINED = 64
"""Requests that wait for the answer to one before, as a stream is."""
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)

if TYPE_CHECKING:  # either of uvicorn's two; what is used here both have

    class _Base(asyncio.Protocol):
        transport: asyncio.Transport
        cycle: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def send_400_response(self, msg: str) -> None: ...
else:
    _Base = AutoHTTPProtocol


def impatient(refusals: Refusals) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with an end to its patience."""

    class Impatient(_Base):
        _timer: asyncio.TimerHandle | None = None
        _began = 0.0
        _received = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._watch()
            self._received += len(data)
            super().data_received(data)
            if self.transport.is_closing():
                return
            if len(getattr(self, "pipeline", ())) > MAX_PIPELINED:  # h11 reads no further by itself
                self._refuse("pipelined")
            elif self._awaits_head and self._received > MAX_HEAD:
                self.transport.write(TOO_LARGE)
                self._refuse("heads")
            elif self._received > MAX_REQUEST:
                self._refuse("bodies")
            elif not self._awaits_head and not self.cycle.more_body:
                self._rest()

        def send_400_response(self, msg: str) -> None:
            self._count("malformed")
            super().send_400_response(msg)

        @property
        def _awaits_head(self) -> bool:
            """A request that was answered before its end may still send its body."""
            cycle = self.cycle
            return cycle is None or (cycle.response_complete and not cycle.more_body)

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
