"""What `neuroscope bench hub --against sse-starlette` measures: the textbook broadcaster.

A queue for each reader; every event goes into the queue of each reader that asked for it, and each
reader's response sends them one by one. It is given ready-made frames, and has no replay, no
count of what it lost, and no bound but the length of its queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import uvicorn
import zmq.asyncio
from fastapi import FastAPI
from sse_starlette import EventSourceResponse

QUEUED_EVENTS = 1000
"""A reader's backlog; without a bound a few slow readers take all memory."""

_frames = msgspec.msgpack.Decoder(list[tuple[str, bytes]])


def make_app(endpoint: str) -> FastAPI:
    queues: defaultdict[str | None, set[asyncio.Queue[bytes]]] = defaultdict(set)

    async def broadcast() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.PULL) as ear:
            ear.setsockopt(zmq.RCVHWM, 4)
            ear.bind(endpoint)
            while True:
                for name, frame in _frames.decode(await ear.recv()):
                    for key in (name, None):
                        for queue in queues.get(key, ()):
                            with contextlib.suppress(asyncio.QueueFull):
                                queue.put_nowait(frame)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(broadcast())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/v1/features/stream")
    async def stream(request_id: str | None = None) -> EventSourceResponse:
        queue: asyncio.Queue[bytes] = asyncio.Queue(QUEUED_EVENTS)
        queues[request_id].add(queue)

        async def events() -> AsyncIterator[bytes]:
            try:
                yield b"retry: 3000\n\n"
                while True:
                    frame = await queue.get()
                    yield frame
                    if request_id is not None and b"\nevent: done\n" in frame:
                        return
            finally:
                queues[request_id].discard(queue)

        return EventSourceResponse(events())

    return app


if __name__ == "__main__":
    listener, endpoint = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    config = uvicorn.Config(make_app(endpoint), log_level="warning", access_log=False)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
