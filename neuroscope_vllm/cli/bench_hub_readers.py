"""The readers of `neuroscope bench hub`: many SSE connections in one process.

Each keeps its own books: events received, and events that a `gap` said were lost. Answers are read
with asyncio's streams, chunk by chunk; a client library would take more of the machine's time than
the hub does.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from array import array
from collections import Counter
from typing import Any

import msgspec
import numpy as np

from neuroscope_vllm.cli.bench_hub_feed import TICK_S
from neuroscope_vllm.core import events

CONNECTING = 64
"""Readers that connect at once, less than a listener's backlog."""
QUIET_S = 10.0
"""Once the engine has ended: how long without an event until nothing more will come."""

_EVENT = b"\ndata: "
_GAP = re.compile(rb"event: gap\ndata: (.*)\n\n")
_STAMP = re.compile(rb'"l0":(\d+)')
_gap = msgspec.json.Decoder(events.GapEvent)


class Readers(msgspec.Struct):
    """Which readers this process is."""

    port: int
    first: int
    count: int
    follow: str
    """`own`: a reader follows the requests of its slot; `all`: everything."""
    origin: float
    lags_file: str


class Reader:
    """One reader, and its books."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.received = 0
        self.expected: int | None = None
        """Events of what it follows, once the engine has ended."""
        self.lost: Counter[str] = Counter()
        """Events by the reason that a gap gave."""

    @property
    def done(self) -> bool:
        told = self.received + sum(self.lost.values())
        return self.expected is not None and told >= self.expected


class Crowd:
    """All readers of the process."""

    def __init__(self, asked: Readers) -> None:
        self._asked = asked
        self._readers = [Reader(asked.first + i) for i in range(asked.count)]
        self._turn = asyncio.Semaphore(CONNECTING)
        self._connected = 0
        self._all_connected = asyncio.Event()
        self._heard_at = time.monotonic()
        self._lags = array("f")

    async def run(self) -> dict[str, Any]:
        tasks = [asyncio.create_task(self._follow(reader)) for reader in self._readers]
        await self._all_connected.wait()
        _say("connected")
        expected: list[int] = json.loads(await asyncio.to_thread(sys.stdin.readline))
        for reader in self._readers:
            reader.expected = expected[reader.number]
        self._heard_at = time.monotonic()
        while not all(one.done for one in self._readers):
            if time.monotonic() > self._heard_at + QUIET_S:
                break
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        failures = await asyncio.gather(*tasks, return_exceptions=True)
        np.save(self._asked.lags_file, np.frombuffer(self._lags, np.float32))
        return {
            "received": [one.received for one in self._readers],
            "lost": [dict(one.lost) for one in self._readers],
            "failures": sorted({repr(one) for one in failures if isinstance(one, Exception)}),
        }

    async def _follow(self, reader: Reader) -> None:
        number = 0
        while True:
            name = f"bench-{reader.number}-{number}" if self._asked.follow == "own" else None
            await self._read(reader, name, first=number == 0)
            number += 1

    async def _read(self, reader: Reader, name: str | None, first: bool) -> None:
        query = f"?request_id={name}" if name else ""
        async with self._turn:
            stream, writer = await asyncio.open_connection("127.0.0.1", self._asked.port)
            writer.write(
                b"GET /v1/features/stream%b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % query.encode()
            )
            head = await stream.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise OSError(f"a reader was answered with {head.splitlines()[0].decode()}")
        try:
            while size := int(await stream.readuntil(b"\r\n"), 16):
                frames = (await stream.readexactly(size + 2))[:-2]
                if first:  # its subscription stands as soon as it is written to
                    first = False
                    self._note_connected()
                self._take(reader, frames)
        finally:
            writer.close()

    def _note_connected(self) -> None:
        self._connected += 1
        if self._connected == len(self._readers):
            self._all_connected.set()

    def _take(self, reader: Reader, frames: bytes) -> None:
        """Whole frames: a write of the server is a chunk of its answer."""
        now = time.monotonic()
        if not (told := frames.count(_EVENT)):
            return  # a comment that keeps the connection alive
        self._heard_at = now
        reader.received += told
        if b"event: g" in frames:
            for body in _GAP.findall(frames):
                gap = _gap.decode(body)
                if gap.reason != "dropped":
                    reader.received -= 1
                    reader.lost[gap.reason] += gap.count or 0
                elif self._asked.follow == "own":
                    # The request's, not this reader's: the hub told it beside what was published.
                    reader.received -= 1
            reader.received -= frames.count(b"event: goodbye\n")
        if stamp := _STAMP.search(frames):
            self._lags.append(now - self._asked.origin - int(stamp[1]) * TICK_S)


def _say(word: object) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


def words(asked: Readers) -> list[str]:
    """The command of a process that says "connected", is told on stdin how many events each reader
    is to have, and then prints {"received", "lost", "failures"}."""
    return [sys.executable, "-m", __name__, msgspec.json.encode(asked).decode()]


if __name__ == "__main__":
    _say(asyncio.run(Crowd(msgspec.json.decode(sys.argv[1], type=Readers)).run()))
