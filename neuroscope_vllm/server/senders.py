"""Who sends to this hub, and whether they are well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from neuroscope_vllm.core import wire
from neuroscope_vllm.server.engines import Engines

LOST_AFTER_S = 5.0
"""Senders say hello once a second."""
FORGOTTEN_AFTER_S = 60.0
MAX_SENDERS = 1024
"""Two and more an engine; others are refused, and counted."""


class Sender:
    """The last hello of one worker or scheduler, and when it was heard."""

    def __init__(self, hello: wire.Hello, now: float) -> None:
        self.hello = hello
        self.heard_at = now

    def lost(self, now: float) -> bool:
        return now - self.heard_at > LOST_AFTER_S

    def gone(self, now: float) -> bool:
        return now - self.heard_at > FORGOTTEN_AFTER_S


class Senders:
    """All senders by name; `engines`: what is remembered of theirs."""

    def __init__(self) -> None:
        self._senders: dict[str, Sender] = {}
        self._dense: dict[int, frozenset[int]] = {}
        self.engines = Engines()

    def __iter__(self) -> Iterator[Sender]:
        return iter(self._senders.values())

    def admits(self, hello: wire.Hello) -> bool:
        """Whether it is known, or there is room for it."""
        return hello.sender in self._senders or len(self._senders) < MAX_SENDERS

    def hello(self, hello: wire.Hello, now: float) -> list[Sender]:
        """Refresh a sender; returns the lost ones that it takes the place of, as a server that
        was started again does."""
        replaced: list[Sender] = []
        if hello.sender not in self._senders:
            replaced = self._replaced_by(hello, now)
            for other in replaced:
                del self._senders[other.hello.sender]
        self._senders[hello.sender] = Sender(hello, now)
        self.engines.hello(hello, now)
        if hello.sites:
            self._dense = {site.layer: frozenset(site.dense) for site in self.sites()}
        return replaced

    def _replaced_by(self, hello: wire.Hello, now: float) -> list[Sender]:
        """None of an engine that is heard still: what is silent there is cut off from us."""
        heard = {s.hello.engine for s in self if not s.lost(now)} - {hello.engine}
        return [
            other
            for other in self
            if other.lost(now)
            and _place(other.hello) == _place(hello)
            and other.hello.engine not in heard
        ]

    def excuse(self, pause: float) -> None:
        """Nobody could be heard for `pause` seconds."""
        for sender in self._senders.values():
            sender.heard_at += pause

    def forget(self, now: float) -> None:
        """Forget engines of which nobody was heard for so long that they will not come back. While
        one sender is heard, the silence of another is a fault."""
        there = {s.hello.engine for s in self if not s.gone(now)}
        for name, sender in list(self._senders.items()):
            if sender.hello.engine not in there:
                del self._senders[name]
                if sender.hello.role == "scheduler":
                    self.engines.miss(sender.hello.engine)
        self.engines.forget(there, now)

    def goodbye(self, name: str) -> Sender | None:
        sender = self._senders.pop(name, None)
        if sender is not None:
            self.engines.goodbye(sender.hello)
        return sender

    def sites(self) -> list[wire.Site]:
        """What is observed, one site per layer, in layer order."""
        sites = {site.layer: site for s in self._senders.values() for site in s.hello.sites}
        return [sites[layer] for layer in sorted(sites)]

    def dense(self, layer: int) -> frozenset[int]:
        """Features of a layer that fire nearly everywhere."""
        return self._dense.get(layer, frozenset())

    def schedulers(self, now: float) -> set[str]:
        """Engines whose scheduler may still be heard of."""
        return {s.hello.engine for s in self if s.hello.role == "scheduler" and not s.gone(now)}

    @property
    def heard_worker(self) -> bool:
        return bool(self.workers())

    def workers(self) -> list[Sender]:
        return [sender for sender in self._senders.values() if sender.hello.role == "worker"]

    def armed(self, now: float) -> bool:
        """Whether every worker is."""
        workers = self.workers()
        return bool(workers) and all(s.hello.armed and not s.lost(now) for s in workers)

    def problems(self, now: float) -> list[str]:
        """One sentence for everything that is not as it should be."""
        found: list[str] = []
        if not self.heard_worker:
            found.append("no worker has said hello yet; the model is loading or the plugin is off.")
        for name, sender in self._senders.items():
            hello = sender.hello
            if sender.lost(now):
                found.append(f"{name} has been silent for {now - sender.heard_at:.0f} s.")
            elif hello.wire_version != wire.WIRE_VERSION:
                found.append(
                    f"{name} speaks wire version {hello.wire_version}, this side process"
                    f" {wire.WIRE_VERSION}; install the same neuroscope-vllm for both."
                )
            elif hello.role == "worker" and not hello.armed:
                found.append(f"{name} is not armed: {_why_not(hello)}")
        return found

    def describe(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "sender": name,
                "role": sender.hello.role,
                "dp_rank": sender.hello.dp_rank,
                "model": sender.hello.model,
                "armed": sender.hello.armed,
                "lost": sender.lost(now),
                "silent_s": round(now - sender.heard_at, 1),
                "host": sender.hello.host,
                "device": sender.hello.device,
                "runner": sender.hello.runner,
                "cudagraph_mode": sender.hello.cudagraph_mode,
                "warnings": sender.hello.warnings,
                "counters": sender.hello.counters,
                "self_test": msgspec.to_builtins(sender.hello.self_test),
            }
            for name, sender in self._senders.items()
        ]


def _place(hello: wire.Hello) -> tuple[str, str, int]:
    return hello.model, hello.role, hello.dp_rank


def _why_not(hello: wire.Hello) -> str:
    if failures := [test.failure for test in hello.self_test if test.failure]:
        return " ".join(failures)
    if hello.self_test:
        return "its last step could not be encoded; vLLM's log has the reason."
    return "it is still loading, or in its self-test."
