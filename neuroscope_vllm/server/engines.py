"""What outlives the senders of an engine: what they counted, and that it went without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from neuroscope_vllm.core import wire

MISSED_S = 900.0
"""Since an engine was heard; for so long an alert finds it."""
REMEMBERED_S = 3600.0
MAX_REMEMBERED = 2048
"""Engines, and senders of them."""


class Engine:
    """Attributes:
    hellos: The last of each sender that did not say goodbye.
    since, heard_at: When one of its senders was heard first, and last.
    there_at: When it had senders last.
    missing: Its scheduler went silent, without a goodbye.
    """

    def __init__(self, hello: wire.Hello, now: float) -> None:
        self.hellos: dict[str, wire.Hello] = {}
        self.since = self.heard_at = self.there_at = now
        self.missing = False
        self.place = hello.model, hello.dp_rank
        self._ended: dict[str, Counter[str]] = {}
        """By role, of senders that said goodbye."""

    def totals(self) -> dict[str, Counter[str]]:
        """By role. A sender that is started again counts from 0 under another name, so that none
        goes back."""
        totals = {role: counters.copy() for role, counters in self._ended.items()}
        for hello in self.hellos.values():
            totals.setdefault(hello.role, Counter()).update(hello.counters)
        return totals

    def goodbye(self, sender: str) -> None:
        if hello := self.hellos.pop(sender, None):
            self._ended.setdefault(hello.role, Counter()).update(hello.counters)


class Engines:
    """Engines by name, until an hour after their last sender left."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}

    def hello(self, hello: wire.Hello, now: float) -> None:
        engine = self._engines.get(hello.engine)
        if engine is None:
            engine = self._engines[hello.engine] = Engine(hello, now)
        is_new = hello.sender not in engine.hellos
        engine.hellos[hello.sender] = hello
        engine.heard_at = engine.there_at = now
        engine.missing = False
        if is_new:
            self._make_room()

    def goodbye(self, hello: wire.Hello) -> None:
        if hello.engine in self._engines:
            self._engines[hello.engine].goodbye(hello.sender)

    def miss(self, name: str) -> None:
        """Until a sender of it is heard again."""
        if name in self._engines:
            self._engines[name].missing = True

    def forget(self, there: set[str], now: float) -> None:
        """`there`: engines that have senders."""
        for name, engine in list(self._engines.items()):
            if name in there:
                engine.there_at = now
            elif now - engine.there_at > REMEMBERED_S:
                del self._engines[name]

    def missing(self, now: float) -> Iterator[tuple[str, Engine]]:
        """Those whose place no engine that began later has."""
        for name, engine in self._engines.items():
            if engine.missing and now - engine.heard_at <= MISSED_S and not self._replaced(engine):
                yield name, engine

    def totals(self) -> dict[tuple[str, str], Counter[str]]:
        """By engine and role."""
        return {
            (name, role): counters
            for name, engine in self._engines.items()
            for role, counters in engine.totals().items()
        }

    def _replaced(self, engine: Engine) -> bool:
        return any(
            other.place == engine.place and other.since > engine.heard_at
            for other in self._engines.values()
        )

    def _make_room(self) -> None:
        while sum(1 + len(one.hellos) for one in self._engines.values()) > MAX_REMEMBERED:
            engines = self._engines
            del engines[min(engines, key=lambda name: engines[name].there_at)]
