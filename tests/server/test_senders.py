"""Engines that come and go, on a clock of the test's: who is armed, and what is counted."""

from __future__ import annotations

import time

import pytest

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.server.engines import MAX_REMEMBERED
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.sender_metrics import sender_metrics


class Cluster:
    """A hub whose time stands where it is set, and engines that say hello to it once a second."""

    def __init__(self) -> None:
        self.hub = Hub(Settings(), "m")
        self._now = time.monotonic()
        self._hellos: dict[str, wire.Hello] = {}

    def begin(self, engine: str, *senders: str) -> None:
        """Senders are named after their role and, behind a dash, anything."""
        for name in senders:
            role = name.partition("-")[0]
            about = {"armed": role == "worker", "counters": {"rows_encoded": 10}}
            self._hellos[f"{engine} {name}"] = wire.Hello(
                f"{engine} {name}", role, engine, 0, "m", host=f"host of {engine} {name}", **about
            )

    def silence(self, *names: str) -> None:
        for name in names:
            del self._hellos[name]

    def end(self, *names: str) -> None:
        self.silence(*names)
        for name in names:
            self.hub.handle(wire.Goodbye(name), now=self._now)

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self._now += 1
            for hello in self._hellos.values():
                self.hub.handle(hello, now=self._now)
            self.hub.tick(now=self._now)

    def samples(self, name: str, label: str = "engine") -> dict[str, float]:
        return {
            sample.labels[label]: sample.value
            for metric in sender_metrics(self.hub.senders, self._now)
            for sample in metric.samples
            if sample.name == f"neuroscope_{name}"
        }

    @property
    def is_armed(self) -> bool:
        return self.hub.senders.armed(self._now)


def test_an_engine_that_died_is_not_armed_for_a_quarter_of_an_hour():
    cluster = Cluster()
    for engine in ("a", "b", "c"):
        cluster.begin(engine, "worker", "scheduler")
    cluster.run(2)
    cluster.silence("a worker", "a scheduler")
    cluster.end("b worker", "b scheduler")
    cluster.run(890)
    assert cluster.samples("armed") == {"a": 0, "c": 1}
    hosts = {"host of a worker", "host of a scheduler", "host of c worker"}
    assert cluster.samples("engine_info", "host").keys() == hosts
    assert cluster.is_armed  # it is no longer waited for
    cluster.run(20)
    assert cluster.samples("armed") == {"c": 1}


@pytest.mark.parametrize("after", [30, 300])
def test_an_engine_that_is_started_again_takes_the_place_of_the_dead_one(after: int):
    cluster = Cluster()
    for engine in ("before", "another"):
        cluster.begin(engine, "worker", "scheduler")
    cluster.run(2)
    cluster.silence("before worker", "before scheduler")
    cluster.run(after)
    assert cluster.samples("armed") == {"before": 0, "another": 1}
    cluster.begin("again", "worker")  # its scheduler comes when the model is loaded
    cluster.run(61)
    assert cluster.samples("armed") == {"again": 1, "another": 1}


@pytest.mark.parametrize("cut_off", [["a worker-1"], ["a worker-0", "a scheduler"]])
def test_half_an_engine_is_not_armed_however_long(cut_off: list[str]):
    """Two pipeline stages on two hosts, one of which is cut off; its requests end nevertheless."""
    cluster = Cluster()
    cluster.begin("a", "worker-0", "worker-1", "scheduler")
    cluster.run(2)
    cluster.hub.handle(wire.RequestStarted("runs", "runs", 0, "a", 0, b"", 0.0))
    cluster.silence(*cut_off)
    cluster.run(300)
    cluster.begin("elsewhere", "worker", "scheduler")
    cluster.run(300)
    assert cluster.samples("armed") == {"a": 0, "elsewhere": 1}
    assert not cluster.is_armed
    assert cluster.hub.counters["requests_failed"] == ("a scheduler" in cut_off)


def test_totals_stay_an_hour_and_do_not_fall_while_their_engine_lives():
    cluster = Cluster()
    for engine in ("left", "died", "lives"):
        cluster.begin(engine, "worker", "scheduler")
    cluster.run(2)
    cluster.end("left worker", "left scheduler")
    cluster.silence("died worker", "died scheduler")
    for number in range(5):
        cluster.begin("lives", f"worker-{number}")
        cluster.run(1)
        cluster.end(f"lives worker-{number}")
    cluster.run(3500)
    assert cluster.samples("rows_encoded_total") == {"left": 10, "died": 10, "lives": 60}
    cluster.run(200)
    assert cluster.samples("rows_encoded_total") == {"lives": 60}


def test_what_is_remembered_of_engines_is_bounded():
    cluster = Cluster()
    cluster.begin("lives", "worker", "scheduler")
    for number in range(MAX_REMEMBERED + 100):
        cluster.begin(f"strange-{number}", "worker")
        cluster.run(1)
        cluster.end(f"strange-{number} worker")
    found = cluster.samples("rows_encoded_total")
    assert found["lives"] == 10
    assert len(found) < MAX_REMEMBERED
