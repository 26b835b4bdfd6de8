"""The engine's end of the wire: a thread that ships messages to the hub and never blocks a step.

Torch-free. One Sender per role and process. When the hub is away or slow, messages are dropped
and counted; the counters travel in the next Hello.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

import zmq

from neuroscope_vllm.core import wire

logger = logging.getLogger(__name__)

HELLO_INTERVAL_S = 1.0
_STOP = object()


class Sender:
    """Queue in front, DEALER socket behind.

    `hello` is called once a second, on the sender's thread, with the current counters; `resync`,
    likewise, when the hub is back after something could not be delivered.
    """

    def __init__(
        self,
        endpoint: str,
        hello: Callable[[dict[str, int]], wire.Hello],
        resync: Callable[[], None] = lambda: None,
        capacity: int = 1024,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._endpoint = endpoint
        self._hello = hello
        self._resync = resync
        self._lost = False
        self._queue: queue.Queue[object] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, name="neuroscope-sender", daemon=True)

    def start(self) -> None:
        """Connect and say hello; what was put before is sent then."""
        self._thread.start()

    def put(self, message: wire.Message) -> bool:
        """Queue a message; False (and counted) when the queue is full. Never blocks."""
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self.counters["messages_dropped"] += 1
            self._lost = True
            return False
        return True

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
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        # Queue nothing inside ZMQ for a hub that is not there: drop here, where it is counted.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDHWM, 256)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        socket.connect(self._endpoint)
        next_hello = 0.0
        while True:
            now = time.monotonic()
            if now >= next_hello:
                sent = self._send(socket, self._hello(dict(self.counters)), count=False)
                next_hello = now + (HELLO_INTERVAL_S if sent else 0.05)
                if sent and self._lost:
                    self._lost = False
                    self._resync()
                elif not sent:
                    self._lost = True
            try:
                message = self._queue.get(timeout=max(0.0, next_hello - now))
            except queue.Empty:
                continue
            if message is _STOP:
                break
            self._send(socket, message)  # type: ignore[arg-type]
        self._send(socket, wire.Goodbye(self._hello(dict(self.counters)).sender), count=False)
        socket.close()
        context.term()

    def _send(self, socket: zmq.Socket[bytes], message: wire.Message, count: bool = True) -> bool:
        try:
            socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            if count:
                self.counters["messages_dropped"] += 1
                self._lost = True
            return False
        except (TypeError, ValueError, OverflowError):
            # One message that can not be encoded must not end the stream.
            self.counters["messages_unencodable"] += 1
            logger.exception("neuroscope: a message can not be encoded")
            return False
        if count:
            self.counters["messages_sent"] += 1
        return True
