"""Streams a subscription to one reader, as SSE or NDJSON.

sse-starlette gives keep-alive comments, a time limit for each send, and notices when the reader
leaves. It is used for NDJSON and for long answers, too: bytes pass through it as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Any

from sse_starlette import EventSourceResponse
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.subscribe import AllRequests, OneRequest
from neuroscope_vllm.server.view import View

BATCH_EVENTS = 256
BATCH_BYTES = 1 << 16
"""What a reader that is stuck holds, beside as much in its socket's buffer."""
REST_S = 0.0002
PING_S = 15
SEND_TIMEOUT_S = 10.0
SHUTDOWN_GRACE_S = 1.0
"""sse-starlette would cut streams at shutdown; this leaves time for the goodbye event."""


class Pace:
    """Keeps many busy readers from eating the hub's time, whatever they read.

    A send costs about 0.1 ms however little it carries. After each one a reader rests for
    REST_S times the readers that rest now, while events gather for its next send: nothing for
    a few readers, 0.2 s for a thousand, and never more than half the hub's time for all.
    """

    def __init__(self) -> None:
        self._resting = 0

    async def rest(self) -> None:
        self._resting += 1
        try:
            await asyncio.sleep(self._resting * REST_S)
        finally:
            self._resting -= 1


async def stream(reader: AllRequests | OneRequest, view: View, pace: Pace) -> AsyncIterator[bytes]:
    """What the reader gets, in as few writes as its pace allows."""
    yield view.opening
    while not reader.ended:
        batch = reader.take(BATCH_EVENTS, BATCH_BYTES)
        if chunk := view.render(batch):
            yield chunk
            whole = len(batch) >= BATCH_EVENTS or len(chunk) >= BATCH_BYTES
            if whole:
                await asyncio.sleep(0)  # a send need not wait, and there is more than this reader
            elif not reader.ended:
                await pace.rest()
        elif batch:
            await asyncio.sleep(0)  # nothing of it is wanted
        elif not reader.ended:
            await reader.wait()
    if not reader.closing:
        yield view.ending


_pace = Pace()


class _Watched(EventSourceResponse):
    """An answer whose reader, when it takes nothing for 10 s, is dropped and counted."""

    def __init__(
        self, hub: Hub, content: AsyncIterator[bytes], release: Callable[[], object], **options: Any
    ) -> None:
        super().__init__(
            content,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            send_timeout=SEND_TIMEOUT_S,
            shutdown_grace_period=SHUTDOWN_GRACE_S,
            **options,
        )
        self._hub = hub
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            self._hub.counters["readers_timed_out"] += 1
        finally:
            # Not in the generator: one that never began, because its reader left at once, never
            # comes to its `finally`.
            self._release()


class FeatureResponse(_Watched):
    """The stream of a subscription."""

    def __init__(
        self, hub: Hub, reader: AllRequests | OneRequest, view: View, name: str | None
    ) -> None:
        sse = view.style != "ndjson"
        super().__init__(
            hub,
            stream(reader, view, _pace),
            partial(hub.unsubscribe, reader, name),
            media_type="text/event-stream" if sse else "application/x-ndjson",
            ping=PING_S if sse else 0,
        )


class LongResponse(_Watched):
    """Something long in pieces, of which no more is made than its reader takes.

    `release` is called at its end.
    """

    def __init__(
        self,
        hub: Hub,
        pieces: Iterable[bytes],
        release: Callable[[], object],
        media_type: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        content = _in_turn(pieces)
        super().__init__(hub, content, release, media_type=media_type, ping=0, headers=headers)


async def _in_turn(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)  # a send need not wait, and there are others
