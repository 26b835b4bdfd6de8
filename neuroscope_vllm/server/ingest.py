"""The hub's ear: a ZMQ ROUTER that engines connect to.

Plain sockets on the event loop's reader callback rather than `zmq.asyncio`: one wake-up drains
all that has come, which is what makes thousands of messages a second cheap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path

import msgspec
import zmq

from neuroscope_vllm.core import wire
from neuroscope_vllm.server.hub import Hub

logger = logging.getLogger(__name__)

SLICE_S = 0.005
"""Longest stretch of decoding before readers get their turn."""
TICK_S = 0.25


class Ingest:
    """Feeds a hub from an endpoint, until closed."""

    def __init__(self, hub: Hub, endpoint: str) -> None:
        self._hub = hub
        self._endpoint = endpoint
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.RCVHWM, 4096)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._tick: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Bind and begin. Raises zmq.ZMQError when the endpoint can not be bound."""
        path = self._path
        if path is None:
            self._socket.bind(self._endpoint)
        else:
            path.unlink(missing_ok=True)
            mask = os.umask(0o177)
            try:
                self._socket.bind(self._endpoint)
            finally:
                os.umask(mask)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._drain)
        loop.call_soon(self._drain)
        self._tick = loop.create_task(self._ticking())

    def close(self) -> None:
        if self._tick is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._tick.cancel()
        self._socket.close()
        self._context.term()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path | None:
        scheme, _, rest = self._endpoint.partition("://")
        return Path(rest) if scheme == "ipc" else None

    def _drain(self) -> None:
        """Handle what has come. ZMQ's descriptor is edge-triggered: stop only when it is empty,
        or come back by ourselves."""
        until = time.monotonic() + SLICE_S
        while not self._socket.closed:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(parts[-1])
            if time.monotonic() > until:
                asyncio.get_running_loop().call_soon(self._drain)
                return

    def _take(self, data: bytes) -> None:
        counters = self._hub.counters
        counters["messages"] += 1
        try:
            self._hub.handle(wire.decode(data))
        except (msgspec.MsgspecError, ValueError) as error:
            counters["messages_malformed"] += 1
            if counters["messages_malformed"] == 1:
                logger.warning("neuroscope: a malformed message from an engine: %s", error)
        except Exception:
            # A message that trips us must not end the listening.
            counters["messages_failed"] += 1
            logger.exception("neuroscope: a message could not be handled")

    async def _ticking(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(TICK_S)
                self._hub.tick()
