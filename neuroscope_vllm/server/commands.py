"""What readers have engines do, and the engines' answers."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.steering.spec import SteeringSpec

ANSWER_TIMEOUT_S = 20.0
"""The first command has an engine read its SAEs once more; then it takes a step."""
MAX_WAITING = 1024


class Commands:
    """Commands on their way, by number; counts `steering_refused`, for want of room."""

    def __init__(self, counters: Counter[str]) -> None:
        self.send: Callable[[str, bytes], bool] = lambda engine, data: False
        """To the scheduler of an engine; False: it can not be reached."""
        self._counters = counters
        self._waiting: dict[str, asyncio.Future[wire.SteeringChanged]] = {}

    async def steer(
        self, internal_id: str, engine: str, asked: SteeringSpec | None
    ) -> wire.SteeringChanged:
        """Have an engine steer a running choice otherwise.

        Raises:
            ConnectionError: The engine can not be reached, or has enough to do.
            TimeoutError: It did not answer; the change may still come.
        """
        if len(self._waiting) >= MAX_WAITING:
            self._counters["steering_refused"] += 1
            raise ConnectionError
        command = secrets.token_hex(8)
        answer: asyncio.Future[wire.SteeringChanged] = asyncio.get_running_loop().create_future()
        self._waiting[command] = answer
        try:
            if not self.send(engine, wire.encode(wire.Steer(command, internal_id, asked))):
                raise ConnectionError
            return await asyncio.wait_for(answer, ANSWER_TIMEOUT_S)
        finally:
            del self._waiting[command]

    def answered(self, changed: wire.SteeringChanged) -> None:
        waiting = self._waiting.get(changed.command)
        if waiting is not None and not waiting.done():
            waiting.set_result(changed)
