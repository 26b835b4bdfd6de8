"""The hub's ear: a ZMQ ROUTER that engines connect to.

Plain sockets on the event loop's reader callback rather than `zmq.asyncio`: one wake-up drains
all that has come, which is what makes thousands of messages a second cheap.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections import OrderedDict
from pathlib import Path

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.keys import REFUSED, Keys, read_endpoint
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.senders import MAX_SENDERS

logger = logging.getLogger(__name__)

SLICE_S = 0.005
"""Longest stretch of decoding before readers get their turn."""
TICK_S = 0.25
MAX_HELLO = 1 << 20
"""Bytes of a hello; the latest of every sender is kept."""
WARNING_PAUSE_S = 60.0


class Ingest:
    """Feeds a hub from an endpoint, until closed.

    `endpoint` is `ipc://path`, or `tcp://host:port#key-file`: then engines must show the file's
    key, and those that do not are counted in `connections_refused`. ConfigError if that file can
    not be used.
    """

    def __init__(self, hub: Hub, endpoint: str) -> None:
        self._hub = hub
        # By engine: the address that ZMQ gave its scheduler; the latest MAX_SENDERS.
        self._schedulers: OrderedDict[str, bytes] = OrderedDict()
        self._address, self._keys = read_endpoint(endpoint)
        self._one_clock = self._path is not None  # engines on this host, not on another
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.RCVHWM, 1024)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE)
        self._socket.setsockopt(zmq.LINGER, 0)
        # Else what is sent to one that is gone is lost without a word.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._monitor: zmq.Socket[bytes] | None = None
        self._warn_at = 0.0
        self._trip_at = 0.0
        self._tick: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Bind and begin. Raises ConfigError when the endpoint can not be bound."""
        if self._keys is not None:
            self._admit(self._keys)
        try:
            self._bind()
        except (zmq.ZMQError, OSError) as error:
            self.close()
            raise _not_bound(self._address, error) from None
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._drain)
        loop.call_soon(self._drain)
        self._tick = loop.create_task(self._ticking())
        self._hub.commands.send = self.send

    def send(self, engine: str, data: bytes) -> bool:
        """To the scheduler of an engine; False: it is not connected."""
        address = self._schedulers.get(engine)
        if address is None:
            return False
        try:
            self._socket.send_multipart([address, data], zmq.NOBLOCK)
        except zmq.ZMQError:  # it is gone, or takes nothing
            return False
        return True

    def close(self) -> None:
        if self._tick is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._tick.cancel()
            if self._path is not None:
                self._path.unlink(missing_ok=True)
        self._authenticator.stop()
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close()
        self._socket.close()
        self._context.term()

    @property
    def _path(self) -> Path | None:
        scheme, _, rest = self._address.partition("://")
        return Path(rest) if scheme == "ipc" else None

    def _bind(self) -> None:
        path = self._path
        if path is None:
            self._socket.bind(self._address)
            return
        if _answers(path):
            raise OSError(errno.EADDRINUSE, "")
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._socket.bind(self._address)
        finally:
            os.umask(mask)

    def _admit(self, keys: Keys) -> None:
        """Let engines in that show the key, and notice who does not."""
        self._authenticator.configure_curve_callback(credentials_provider=keys)
        self._authenticator.start()
        keys.arm_hub(self._socket)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._monitor = self._socket.get_monitor_socket(REFUSED)

    def _note_refusals(self) -> None:
        counters = self._hub.counters
        before = counters["connections_refused"]
        while self._monitor is not None and self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            counters["connections_refused"] += 1
        if counters["connections_refused"] > before and time.monotonic() >= self._warn_at:
            self._warn_at = time.monotonic() + WARNING_PAUSE_S
            logger.warning(
                "neuroscope: refused who connects without our key (%d times so far); engines need a"
                " copy of this hub's key file as hub_keys.",
                counters["connections_refused"],
            )

    def _drain(self) -> None:
        """Handle what has come. ZMQ's descriptor is edge-triggered: stop only when it is empty,
        or come back by ourselves."""
        until = time.monotonic() + SLICE_S
        while not self._socket.closed:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(parts[0], parts[-1])
            if time.monotonic() > until:
                asyncio.get_running_loop().call_soon(self._drain)
                return

    def _take(self, address: bytes, data: bytes) -> None:
        counters = self._hub.counters
        counters["messages"] += 1
        try:
            message = wire.decode(data)
            if isinstance(message, wire.Hello) and len(data) > MAX_HELLO:
                raise ValueError(f"a hello of {len(data)} bytes")
            if isinstance(message, wire.Hello) and message.role == "scheduler":
                self._heard(message.engine, address)
            self._hub.handle(message)
            if self._one_clock and isinstance(message, wire.StepFeatures | wire.TokensSampled):
                self._hub.lags.handled(message)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._hub.malformed(error)
        except Exception as error:
            # A message that trips us must not end the listening.
            counters["messages_failed"] += 1
            self._trip("a message could not be handled", error)

    def _heard(self, engine: str, address: bytes) -> None:
        self._schedulers[engine] = address
        self._schedulers.move_to_end(engine)
        if len(self._schedulers) > MAX_SENDERS:
            self._schedulers.popitem(last=False)

    async def _ticking(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                due = time.monotonic() + TICK_S
                await asyncio.sleep(TICK_S)
                self._hub.lags.loop.observe(max(time.monotonic() - due, 0.0))
                try:
                    self._hub.tick()
                    self._note_refusals()
                except Exception as error:
                    self._hub.counters["ticks_failed"] += 1
                    self._trip("what was due could not be done", error)
                self._drain()  # the wake-up is lost where a message failed for want of memory

    def _trip(self, what: str, error: Exception) -> None:
        """Log a fault, unless there was one a short while ago."""
        if time.monotonic() >= self._trip_at:
            self._trip_at = time.monotonic() + WARNING_PAUSE_S
            logger.error(
                "neuroscope: %s; others of the next minute are only counted", what, exc_info=error
            )


def _answers(path: Path) -> bool:
    """Whether another hub listens on this socket file, rather than having left it behind."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _not_bound(address: str, error: OSError | zmq.ZMQError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"hub address {address} is taken by another process; stop it, or choose another."
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return ConfigError(
            f"hub address {address} is none of this machine's; give the IP address of one of its"
            " network interfaces, or tcp://0.0.0.0:port for all of them."
        )
    return ConfigError(f"hub address {address} can not be bound: {error.strerror}.")
