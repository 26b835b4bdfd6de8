"""The engine's end of the wire: a thread that ships messages to the hub and never blocks a step.

Torch-free. One Sender per role and process. When the hub is away or slow, messages are dropped
and counted; the counters travel in the next Hello.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import zmq
from zmq.utils.monitor import recv_monitor_message

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.keys import REFUSED, Keys, read_endpoint

logger = logging.getLogger(__name__)

HELLO_INTERVAL_S = 1.0
LISTEN_INTERVAL_S = 0.02
REFUSED_PAUSE_S = 1.0
ABSENT_WARNING_S = 30.0
HEARTBEAT_MS = 2000
"""Over TCP: both ends notice after three that the other's host went away without a word."""
QUEUED_BYTES = 64 << 20
_STOP = object()


class _Queue(queue.Queue[object]):
    """Full at a number of messages, or with `QUEUED_BYTES` of them."""

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._bytes = 0

    def _qsize(self) -> int:
        return self.maxsize if self._bytes > QUEUED_BYTES else super()._qsize()

    def _put(self, item: object) -> None:
        super()._put(item)
        self._bytes += wire.weight(item)

    def _get(self) -> object:
        item = super()._get()
        self._bytes -= wire.weight(item)
        return item


class Sender:
    """Queue in front, DEALER socket behind.

    `endpoint` is `ipc://path`, or `tcp://host:port#key-file`; ConfigError if that file can not be
    used. `hello` is called once a second, on the sender's thread, with the current counters;
    `resync`, likewise, when the hub is back after something could not be delivered; `command`,
    likewise, with what the hub sends, and must not raise.
    """

    def __init__(
        self,
        endpoint: str,
        hello: Callable[[dict[str, int]], wire.Hello],
        resync: Callable[[], None] = lambda: None,
        capacity: int = 1024,
        command: Callable[[bytes], None] | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._address, self._keys = read_endpoint(endpoint)
        self._hello = hello
        self._resync = resync
        self._command = command
        self._lost = False
        self._queue = _Queue(capacity)
        self._thread = threading.Thread(target=self._run, name="neuroscope-sender", daemon=True)

    def start(self) -> None:
        """Connect and say hello; what was put before is sent then."""
        self._thread.start()

    def put(self, message: wire.Message) -> bool:
        """Queue a message; False (and counted) when the queue is full. Never blocks."""
        if isinstance(message, wire.StepFeatures | wire.TokensSampled):
            message.sent_at = time.monotonic()
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self.counters["messages_dropped"] += 1
            self._lost = True
            return False
        return True

    def miss(self) -> None:
        """A message that should have been put could not be made: counted, and `resync` is due."""
        self.counters["messages_missed"] += 1
        self._lost = True

    def close(self, timeout: float = 1.0) -> None:
        """Flush what is queued, say goodbye, and end the thread."""
        try:
            self._queue.put(_STOP, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _run(self) -> None:
        if hasattr(os, "sched_setaffinity"):
            # vLLM's CPU worker pins itself, and its threads inherit that: leave its core to it.
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        connection = _Connection(self._address, self._keys)
        next_hello, sent = 0.0, False
        while True:
            now = time.monotonic()
            if now >= next_hello:
                if connection.tend(now):
                    self._lost = True  # what ZMQ still held for the old hub went with it
                sent = self._send(connection, self._hello(dict(self.counters)), count=False)
                next_hello = now + (HELLO_INTERVAL_S if sent else 0.05)
                if sent and self._lost:
                    self._lost = False
                    self._resync()
                elif not sent:
                    self._lost = True
            wait = max(0.0, next_hello - now)
            if self._command is not None:
                for data in connection.received():
                    self._command(data)
                wait = min(wait, LISTEN_INTERVAL_S)
            try:
                message = self._queue.get(timeout=wait)
            except queue.Empty:
                continue
            if message is _STOP:
                break
            # Connected a moment ago? The hub must know whom it hears, first of all.
            sent = sent or self._send(connection, self._hello(dict(self.counters)), count=False)
            if sent:
                self._send(connection, message)  # type: ignore[arg-type]
            else:  # also where the hub came between these two lines
                self.counters["messages_dropped"] += 1
                self._lost = True
        self._send(connection, wire.Goodbye(self._hello(dict(self.counters)).sender), count=False)
        connection.close()

    def _send(self, connection: _Connection, message: wire.Message, count: bool = True) -> bool:
        try:
            data = wire.encode(message)
            if len(data) > wire.MAX_MESSAGE:
                raise ValueError(f"it has {len(data)} bytes, more than {wire.MAX_MESSAGE}")
            sent = connection.send(data)
        except (TypeError, ValueError, OverflowError):
            # One message that can not be encoded must not end the stream.
            self.counters["messages_unencodable"] += 1
            logger.exception("neuroscope: a message can not be encoded")
            return False
        if count:
            self.counters["messages_sent" if sent else "messages_dropped"] += 1
            self._lost = self._lost or not sent
        return sent


class _Connection:
    """A DEALER that finds the hub again, also where ZMQ gives up: after a refused handshake."""

    def __init__(self, address: str, keys: Keys | None) -> None:
        self._address = address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._configure(self._socket, keys)
        watched = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | REFUSED
        self._monitor = self._socket.get_monitor_socket(watched)
        self._socket.connect(address)
        self._refusals = 0
        self._connect_at: float | None = None
        self._absent_since: float | None = time.monotonic()
        self._warned = False

    @staticmethod
    def _configure(socket: zmq.Socket[bytes], keys: Keys | None) -> None:
        # Queue nothing inside ZMQ for a hub that is not there: drop here, where it is counted.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDHWM, 256)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if keys is not None:
            keys.arm_engine(socket)
            socket.setsockopt(zmq.IPV6, 1)
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TTL, 3 * HEARTBEAT_MS)

    def send(self, data: bytes) -> bool:
        """False if the hub is not there or its queue is full."""
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def tend(self, now: float) -> bool:
        """Take note of what happened to the connection; True if it broke since the last call."""
        broke = refused = gave_up = False
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._found()
            elif event != zmq.EVENT_DISCONNECTED:
                refused = True
            elif self._absent_since is None:
                broke, self._absent_since = True, now
            else:  # in the middle of a handshake: ZMQ may or may not try again
                gave_up = True
        if refused:
            self._refused()
        if (refused or gave_up) and self._connect_at is None:
            self._connect_at = now + REFUSED_PAUSE_S
            with contextlib.suppress(zmq.ZMQError):  # where ZMQ itself has disconnected
                self._socket.disconnect(self._address)
        elif self._connect_at is not None and now >= self._connect_at:
            self._connect_at = None
            self._socket.connect(self._address)
        if self._absent_since is not None and now > self._absent_since + ABSENT_WARNING_S:
            self._warn("no hub can be reached at %s (setting hub)")
        return broke

    def received(self) -> Iterator[bytes]:
        """What the hub has sent."""
        while True:
            try:
                yield self._socket.recv(zmq.NOBLOCK)
            except zmq.ZMQError:
                return

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def _found(self) -> None:
        if self._warned:
            logger.warning("neuroscope: the hub at %s takes our features now", self._address)
        self._warned, self._refusals, self._absent_since = False, 0, None

    def _refused(self) -> None:
        self._refusals += 1
        if self._refusals == 2:  # once may be a hub that was just being stopped
            self._warn("the hub at %s refuses our key; hub_keys must be a copy of the hub's file")

    def _warn(self, sentence: str) -> None:
        if not self._warned:
            self._warned = True
            message = f"neuroscope: {sentence}; until then features are dropped."
            logger.warning(message, self._address)
