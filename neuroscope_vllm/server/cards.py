"""Feature cards, from a process that reads calibrations, examples and weights with torch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import Counter

import msgspec

from neuroscope_vllm.core.cards.record import Answer, Card, Wanted

ANSWER_TIMEOUT_S = 120.0
"""A large SAE and a large model have to be read, once."""
IDLE_S = 600.0
"""After which the process, which holds an SAE's weights, ends."""
MAX_ANSWER = 1 << 24
MAX_WAITING = 64
"""Who wants a card while one is read."""


class CardError(Exception):
    """One sentence: why there is no card."""


class CardReader:
    """Starts the process when it is needed; one card is read at a time. Counts `cards_refused`,
    for want of room."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._waiting = 0

    async def read(self, wanted: Wanted) -> Card:
        """Raises CardError."""
        if self._waiting >= MAX_WAITING:
            self._counters["cards_refused"] += 1
            raise CardError(f"{MAX_WAITING} others wait for a card; try again later.")
        self._waiting += 1
        try:
            return await self._read_in_turn(wanted)
        finally:
            self._waiting -= 1

    async def _read_in_turn(self, wanted: Wanted) -> Card:
        async with self._turn:
            if self._idle is not None:
                self._idle.cancel()
            try:
                line = await asyncio.wait_for(self._ask(wanted), ANSWER_TIMEOUT_S)
            except (TimeoutError, OSError, ValueError, asyncio.CancelledError) as error:
                # It may still answer, and the next one would take that for theirs. ValueError: it
                # said more than MAX_ANSWER.
                self.close()
                if isinstance(error, asyncio.CancelledError):
                    raise
                raise CardError("the card could not be read; try again.") from error
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self.close)
        answer = msgspec.json.decode(line, type=Answer) if line else Answer(error="it ended.")
        if answer.card is None:
            raise CardError(f"the card could not be read: {answer.error}")
        return answer.card

    async def _ask(self, wanted: Wanted) -> bytes:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "neuroscope_vllm.core.cards",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MAX_ANSWER,
                # It computes a moment at a time; the model's threads have better use of the cores.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(wanted) + b"\n")
        await process.stdin.drain()
        return await process.stdout.readline()

    def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._process = None
