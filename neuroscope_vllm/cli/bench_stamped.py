"""HTTP answers with the time at which each piece came, for measuring what arrives when.

Chats and feature streams of a measurement share one event loop and one clock. A piece is stamped
as it leaves the socket and kept unread: nothing is parsed before the last one is there, so no
stream's arrival waits for another's parsing, as it would behind a client library.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import h11


class Refused(Exception):
    """The server answered with another status than 200; says what."""


class Stamped(asyncio.Protocol):
    """One request and the raw pieces of its answer."""

    def __init__(self, url: str, body: dict[str, Any] | None, headers: dict[str, str]) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        loop = asyncio.get_running_loop()
        self.heard: asyncio.Future[None] = loop.create_future()
        """The answer has begun."""
        self.ended: asyncio.Future[None] = loop.create_future()
        self._http = h11.Connection(h11.CLIENT)
        content = b"" if body is None else json.dumps(body).encode()
        split = urlsplit(url)
        fields = {"Host": split.netloc, "Connection": "close", **headers}
        if body is not None:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        target = split.path + (f"?{split.query}" if split.query else "")
        request = h11.Request(
            method="GET" if body is None else "POST", target=target, headers=list(fields.items())
        )
        parts = [request, *([h11.Data(data=content)] if content else []), h11.EndOfMessage()]
        self._request = b"".join(self._http.send(part) or b"" for part in parts)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        if not self.heard.done():
            self.heard.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (self.heard, self.ended):
            if not future.done():
                future.set_result(None)

    def events(self) -> Iterator[tuple[float, str, dict[str, Any]]]:
        """(when it had come, event name, data) of each server-sent event whose data is an object.

        Raises Refused.
        """
        rest = b""
        for when, piece in self._body():
            *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            for frame in whole:
                fields: dict[bytes, bytes] = {}
                for line in frame.split(b"\n"):
                    name, _, fields[name] = line.partition(b": ")
                if fields.get(b"data", b"").startswith(b"{"):
                    yield when, fields.get(b"event", b"").decode(), json.loads(fields[b"data"])

    def _body(self) -> Iterator[tuple[float, bytes]]:
        status, refusal = 0, b""
        for when, piece in self.pieces:
            self._http.receive_data(piece)
            while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data) and status == 200:
                    yield when, bytes(event.data)
                elif isinstance(event, h11.Data):
                    refusal += bytes(event.data)
        if status != 200:
            said = " ".join(refusal.decode(errors="replace").split())[:200]
            raise Refused(f"was answered with {status or 'nothing'}: {said or 'no reason'}")


async def ask(url: str, body: dict[str, Any] | None, headers: dict[str, str]) -> Stamped:
    """Send a GET, or a POST with a body. Raises OSError where nothing listens."""
    split = urlsplit(url)
    secure = split.scheme == "https"
    _, answer = await asyncio.get_running_loop().create_connection(
        lambda: Stamped(url, body, headers),
        split.hostname or "",
        split.port or (443 if secure else 80),
        ssl=secure or None,
    )
    return answer
