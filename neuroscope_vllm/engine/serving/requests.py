"""What a scheduler tells the hub of its requests, and keeps for a hub that was away."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.sender import Sender

ENDED_KEPT_S = 30.0
ENDED_KEPT = 1024
ENDED_KEPT_TOKENS = 1_000_000
"""How long, and how many requests and tokens that ended are kept."""


class RequestLog:
    """Those that run and lately ended on one engine; tells the hub of each change, in order.

    Attributes:
        live: Those that run, by internal id.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        engine: str,
        dp_rank: int,
        model: str,
        command: Callable[[bytes], None],
    ) -> None:
        """`command`: called with what the hub sends; see `Sender`."""
        self.live: dict[str, wire.Live] = {}
        self._engine = engine
        self._ended: deque[tuple[float, wire.Live]] = deque()
        self._ended_tokens = 0
        # Requests start, go on, and are told again each on a thread of its own.
        self._lock = threading.Lock()
        sender, host = f"scheduler-{engine}-{os.getpid()}", socket.gethostname()
        self.sender = Sender(
            endpoint,
            lambda counters: wire.Hello(
                sender, "scheduler", engine, dp_rank, model, host=host, counters=counters
            ),
            self.resync,
            command=command,
        )

    def started(self, started: wire.RequestStarted) -> None:
        with self._lock:
            self.live[started.internal_id] = wire.Live(started, [])
            self.sender.put(started)

    def scheduled(self, internal_id: str, cached_tokens: int) -> None:
        """Its first forward pass comes; what is said of later ones counts for nothing."""
        with self._lock:
            live = self.live.get(internal_id)
            if live is not None and live.cached_tokens is None:
                live.cached_tokens = cached_tokens
                self.sender.put(wire.RequestScheduled(internal_id, cached_tokens))

    def sampled(self, sampled: Sequence[wire.Sampled]) -> None:
        """Of requests that run."""
        with self._lock:
            for one in sampled:
                live = self.live[one.internal_id]
                one.at = len(live.token_ids)
                live.token_ids.extend(one.token_ids)
                if one.finish_reason:
                    del self.live[one.internal_id]
                    live.finish_reason, live.stop_reason = one.finish_reason, one.stop_reason
                    live.computed_tokens = one.computed_tokens
                    self._keep_ended(live)
            self.sender.put(wire.TokensSampled(list(sampled)))

    def steering_changed(self, changed: wire.SteeringChanged) -> None:
        with self._lock:
            live = self.live.get(changed.internal_id)
            if live is not None and changed.error is None and changed.position is not None:
                edited = live.started.edited_from
                live.started = msgspec.structs.replace(
                    live.started,
                    steering=changed.steering,
                    edited_from=min(
                        changed.position, changed.position if edited is None else edited
                    ),
                    edit_salt=changed.salt,
                )
            self.sender.put(changed)

    def resync(self) -> None:
        """Everything that runs or lately ended, in order with what was put before and after."""
        with self._lock:
            self._forget_ended(time.monotonic())
            ended = [one for _, one in self._ended]
            live = [
                msgspec.structs.replace(one, token_ids=list(one.token_ids))
                for one in self.live.values()
            ]
            self.sender.put(wire.Resync(self._engine, [*ended, *live]))

    def _keep_ended(self, live: wire.Live) -> None:
        now = time.monotonic()
        self._ended.append((now, live))
        self._ended_tokens += _tokens(live)
        self._forget_ended(now)

    def _forget_ended(self, now: float) -> None:
        while self._ended and (
            now - self._ended[0][0] > ENDED_KEPT_S
            or self._ended_tokens > ENDED_KEPT_TOKENS
            or len(self._ended) > ENDED_KEPT
        ):
            self._ended_tokens -= _tokens(self._ended.popleft()[1])


def prompt_tokens(live: wire.Live) -> int:
    return len(live.started.prompt_token_ids) // 4


def _tokens(live: wire.Live) -> int:
    return prompt_tokens(live) + len(live.token_ids)
