"""How fast, and for how much: what keeps a run of requests within its bounds. Torch-free.

For one event loop: nothing here waits between reading a number and changing it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator


class _Changes:
    """Wakes all who wait for something to change; none is missed that comes after the check."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    async def wait(self, seconds: float | None = None) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._next.wait(), seconds)

    def tell(self) -> None:
        self._next.set()
        self._next = asyncio.Event()


class Concurrency:
    """How many requests run at once: halves when the server says "too many", and grows back.

    Attributes:
        most: Never more.
        limit: Now.
        least: The smallest limit so far.
    """

    def __init__(self, most: int) -> None:
        self.most = self.limit = self.least = most
        self._running = 0
        self._good = 0
        self._round = 0
        self._resume_at = -math.inf
        self._is_closed = False
        self._changes = _Changes()

    def close(self) -> None:
        """The end: nobody waits any more."""
        self._is_closed = True
        self._changes.tell()

    async def rest(self, seconds: float) -> None:
        """Sleep, at most until the end."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while not self._is_closed and (left := until - loop.time()) > 0:
            await self._changes.wait(left)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Wait for one's turn, or for the end; yields the round, for `too_many`."""
        while not self._is_closed:
            if (pause := self._resume_at - asyncio.get_running_loop().time()) > 0:
                await self._changes.wait(pause)
            elif self._running >= self.limit:
                await self._changes.wait()
            else:
                break
        self._running += 1
        try:
            yield self._round
        finally:
            self._running -= 1
            self._changes.tell()

    def too_many(self, began: int, wait: float) -> None:
        """A request that began in this round was refused for being one too many.

        Those that were under way together count once: the limit is halved, and a round begins.

        Args:
            wait: Seconds in which no request is to begin.
        """
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + wait)
        if began == self._round:
            self.limit = max(self.limit // 2, 1)
            self.least = min(self.least, self.limit)
            self._round += 1
            self._good = 0

    def went_well(self) -> None:
        """A request was served: after as many as the limit, one more may run."""
        self._good += 1
        if self._good >= self.limit and self.limit < self.most:
            self.limit += 1
            self._good = 0


class Budget:
    """What a run may cost: a request's worst case is set aside before it is sent.

    Attributes:
        most: US dollars; infinite without a bound.
        spent: What answers cost.
        lost: The worst case of requests that broke off, which may have been billed.
        is_used_up: Whether a request was not sent because it could have passed the bound.
    """

    def __init__(self, most: float | None) -> None:
        self.most = math.inf if most is None else most
        self.spent = self.lost = 0.0
        self.is_used_up = False
        self._set_aside: list[float] = []
        self._changes = _Changes()

    async def reserve(self, worst: float) -> bool:
        """Set money aside, once there is enough: what runs may turn out cheaper than feared.

        Returns:
            False if there never will be: the run is at its end.
        """
        while not self.is_used_up and self._committed() + worst > self.most:
            if self._set_aside:
                await self._changes.wait()
            else:
                self.is_used_up = True
                self._changes.tell()
        if not self.is_used_up:
            self._set_aside.append(worst)
        return not self.is_used_up

    def settle(self, worst: float, *, spent: float = 0.0, lost: float = 0.0) -> None:
        """Give back what was set aside, less what it came to."""
        self._set_aside.remove(worst)
        self.spent += spent
        self.lost += lost
        self._changes.tell()

    def _committed(self) -> float:
        return self.spent + self.lost + math.fsum(self._set_aside)
