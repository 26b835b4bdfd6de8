"""Memory and slow readers: the hub with real messages, on a clock of the test's."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from starlette.types import Message

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.engine.fake import FakeEngine, Ids, Script, messages
from neuroscope_vllm.server import sse
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.traces import aliases
from neuroscope_vllm.server.view import View
from tests.server.side import Side, parse_sse


def run(
    hub: Hub, name: str, prompt: int = 4, output: int = 4, script: Script | None = None
) -> None:
    ids = Ids(f"{name}-internal", name, list(range(prompt)), list(range(output)))
    for message in messages(ids, script or Script()):
        hub.handle(wire.decode(wire.encode(message)), now=time.monotonic())


def test_finished_requests_are_kept_up_to_a_number():
    hub = Hub(Settings(trace_requests=3), "m")
    for n in range(5):
        run(hub, f"r{n}")
        hub.traces.find("r0")  # asked for again and again, it stays
    assert [n for n in range(5) if hub.traces.find(f"r{n}")] == [0, 3, 4]
    assert hub.traces.evicted == 2


def test_memory_never_exceeds_the_ceiling():
    hub = Hub(Settings(memory_mb=1), "m")
    for n in range(30):
        run(hub, f"r{n}", output=100)
        assert hub.traces.bytes + hub.ring.bytes + hub.prefixes.bytes <= 2**20
    assert hub.traces.evicted > 0
    assert hub.traces.bytes == sum(trace.bytes for trace in hub.traces)


def test_a_request_larger_than_memory_keeps_its_latest_part():
    hub = Hub(Settings(memory_mb=1), "m")
    reader = hub.subscribe("big")
    run(hub, "big", prompt=3000)
    taken = reader.take(10_000)
    assert taken[0].name == "gap"
    assert b'"reason":"evicted"' in taken[0].json
    assert taken[-1].name == "done"
    lost = int(taken[0].json.rpartition(b":")[2][:-1])
    assert lost + len(taken) - 1 == 1 + 3000 + 4 + 1


def test_a_span_without_rows_at_the_end_of_a_step():
    """Of a request of which nothing ran in it."""
    hub = Hub(Settings(), "m")
    ids = Ids("empty-internal", "empty", list(range(4)), [1])
    for message in messages(ids, Script()):
        if isinstance(message, wire.StepFeatures):
            rows = len(wire.int32(message.positions))
            message.spans.append(wire.Span("other", rows, rows))
        hub.handle(wire.decode(wire.encode(message)))
    [trace] = hub.traces.find("empty")
    assert trace.end == 1 + 4 + 1 + 1
    assert trace.finished_at is not None


def test_an_internal_id_used_again_is_a_new_request():
    hub = Hub(Settings(), "m")
    run(hub, "same")
    run(hub, "same")
    [trace] = hub.traces.find("same")
    assert trace.end == 1 + 4 + 4 + 1
    assert len(hub.traces) == 1


def test_requests_are_known_by_every_id_a_client_may_have():
    assert aliases("chatcmpl-abc", "chatcmpl-abc-1f") == ["chatcmpl-abc", "abc", "chatcmpl-abc-1f"]
    assert aliases("cmpl-abc-1", "i") == ["cmpl-abc-1", "abc-1", "i"]
    assert aliases("plain-1", "i") == ["plain-1", "i"]


def test_several_layers_give_one_event_each_with_the_labels_of_their_own_sae():
    labels = [Label(index=i, text=f"label {i}", labeller="test") for i in range(16384)]
    hub = Hub(Settings(), "m")
    hub.set_labels({20: [LabelSet("test", labels)]})
    hub.handle(wire.Hello("w", "worker", "e", 0, "m", armed=True, sites=_sites(20, 12)))
    ids = Ids("a", "a", [1, 2], [3])
    for message in messages(ids, Script(), layers=(20, 12), top_k=2):
        hub.handle(message)
    [trace] = hub.traces.find("a")
    shown = [(e.name, e.layer) for e in trace.read(0, 100)]
    assert shown[1:-1] == [("prompt", 12), ("prompt", 20)] * 2 + [("token", 12), ("token", 20)]
    with_label = [e.layer for e in trace.read(0, 100) if b'"label":"label ' in e.json]
    assert with_label == [20, 20]
    only = View(layer=12, style="ndjson").render(trace.read(0, 100)).splitlines()
    assert len(only) == 1 + 3 + 1


def _sites(*layers: int) -> list[wire.Site]:
    sae = SAEInfo(source="s", format="f", architecture="jumprelu", d_model=1, width=8)
    return [wire.Site(layer, sae, "activation", 2, None) for layer in layers]


def test_unknown_and_late_messages_are_counted():
    hub = Hub(Settings(), "m")
    hub.handle(wire.TokensSampled([wire.Sampled("nobody", [1, 2])]))
    assert hub.counters["tokens_of_unknown_request"] == 2
    run(hub, "a")
    hub.handle(wire.TokensSampled([wire.Sampled("a-internal", [1])]))
    assert hub.counters["tokens_of_unknown_request"] == 3


def test_one_request_with_broken_tokens_does_not_harm_the_step_of_others():
    hub = Hub(Settings(), "m")
    for name in ("bad", "good"):
        start, scheduled, rows, *_ = messages(Ids(name, name, [1], [2]), Script())
        for message in (start, scheduled, rows):
            hub.handle(message)
    broken = wire.Sampled("bad", [1 << 40])
    hub.handle(wire.TokensSampled([broken, wire.Sampled("good", [2], "length")]))
    [bad], [good] = hub.traces.find("bad"), hub.traces.find("good")
    assert [event.name for event in bad.read(0, 9)] == ["request", "prompt", "error", "done"]
    assert [event.name for event in good.read(0, 9)] == ["request", "prompt", "token", "done"]


def test_a_lost_sender_is_shown_and_replaced():
    hub = Hub(Settings(), "m")
    hub.handle(wire.Hello("old", "worker", "e", 0, "m", armed=True), now=0)
    assert hub.senders.armed(5)
    assert not hub.senders.armed(5.1)
    assert hub.senders.problems(6) == ["old has been silent for 6 s."]
    hub.handle(wire.Hello("new", "worker", "e", 0, "m", armed=True), now=6)
    assert hub.senders.problems(6) == []


def test_a_slow_reader_is_told_and_a_fast_one_loses_nothing(new_side: Callable[..., Side]):
    side = new_side(settings={"memory_mb": 16})
    total, steps = 16_000, Script(chunk=200, pause_s=0.04)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", side.port))
    slow.sendall(b"GET /v1/features/stream HTTP/1.0\r\nHost: localhost\r\n\r\n")
    with FakeEngine(side.endpoint) as engine, side.open() as fast:
        side.wait_armed()
        running = threading.Thread(target=engine.run, args=("load", [1] * (total - 3), [2], steps))
        running.start()
        received = []
        while not received or received[-1]["event"] != "done":
            received.append(next(fast))
        running.join()
    assert len(received) == total
    assert [event["event"] for event in received if event["event"] not in ("prompt", "token")] == [
        "request",
        "done",
    ]
    events: list[dict[str, Any]] = []
    slow.settimeout(10)
    with slow.makefile("r", newline="\n", encoding="utf-8") as lines:
        for event in parse_sse(line.rstrip("\r\n") for line in lines):
            events.append(event)
            if event["event"] == "done":
                break
    slow.close()
    gaps = [event for event in events if event["event"] == "gap"]
    assert gaps
    assert {event["reason"] for event in gaps} == {"slow_reader"}
    told = len(events) - len(gaps)
    assert told + sum(gap["count"] for gap in gaps) == total


def test_a_reader_that_takes_nothing_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sse, "SEND_TIMEOUT_S", 0.1)
    hub = Hub(Settings(), "m")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def read() -> None:
        response = sse.FeatureResponse(hub, hub.subscribe_all(), View(), None)
        await response({"type": "http", "method": "GET"}, receive, send)

    asyncio.run(read())
    assert hub.counters["readers_timed_out"] == 1
    assert hub.readers == 0


def _started(internal_id: str, prompt: list[int]) -> wire.RequestStarted:
    ids = np.asarray(prompt, "<i4").tobytes()
    return wire.RequestStarted(internal_id, internal_id, 0, "e", 0, ids, 0.0)


def test_missed_tokens_wait_for_a_resync_and_come_once():
    hub = Hub(Settings(), "m")
    started = _started("a", [1])
    hub.handle(started)
    hub.handle(wire.TokensSampled([wire.Sampled("a", [2, 3], at=0)]))
    hub.handle(wire.TokensSampled([wire.Sampled("a", [6], at=4)]))  # 4 and 5 were lost
    assert hub.counters["tokens_missed"] == 2
    hub.handle(wire.Resync("e", [wire.Live(started, [2, 3, 4, 5, 6])]))
    hub.handle(wire.TokensSampled([wire.Sampled("a", [6, 7], "length", at=4)]))
    hub.tick(now=1e12)
    [trace] = hub.traces.find("a")
    tokens = [json.loads(e.json) for e in trace.read(0, 100) if e.name == "token"]
    assert [e["token_id"] for e in tokens] == [2, 3, 4, 5, 6, 7]


def test_a_resync_tells_what_ended_meanwhile_once():
    hub = Hub(Settings(), "m")
    started = _started("a", [1, 2])
    ended = wire.Live(started, [3, 4], cached_tokens=1, finish_reason="stop")
    for _ in range(2):
        hub.handle(wire.Resync("e", [ended]))
        hub.tick(now=1e12)
    [trace] = hub.traces.find("a")
    told = [(e.name, json.loads(e.json)) for e in trace.read(0, 100)]
    assert [name for name, _ in told] == [
        "request", "prompt", "gap", "prompt", "token", "token", "done",
    ]  # fmt: skip
    assert (told[2][1]["from"], told[2][1]["to"]) == (1, 3)
    assert told[-1][1]["finish_reason"] == "stop"
    assert (told[-1][1]["cached_tokens"], told[-1][1]["dropped"]) == (1, 2)


def test_a_hub_that_stood_still_does_not_give_up_who_spoke_meanwhile():
    hub = Hub(Settings(), "m")
    now = time.monotonic()
    hub.handle(wire.Hello("s", "scheduler", "e", 0, "m"), now=now)
    hub.handle(_started("a", [1]), now=now)
    hub.tick(now=now + 63)
    assert hub.counters["requests_failed"] == 0
    for second in range(63, 63 + 65):
        hub.tick(now=now + second)
    assert hub.counters["requests_failed"] == 1


def test_a_resync_opens_what_runs_and_ends_what_does_not():
    hub = Hub(Settings(), "m")
    hub.handle(_started("gone", [1]))
    hub.handle(wire.Resync("e", [wire.Live(_started("new", [1]), [5])]))
    hub.tick(now=1e12)
    [gone] = hub.traces.find("gone")
    assert [e.name for e in gone.read(0, 100)][-1] == "done"
    assert "error" in [e.name for e in gone.read(0, 100)]
    [new] = hub.traces.find("new")
    assert new.finished_at is None


LATER = [list(range(100, 148)), list(range(200, 220))]
"""A prompt of three blocks of the prefix cache, and an answer of more than one."""


def cached_of_another(hub: Hub) -> int:
    """Positions of an unsteered request with the same tokens that come with features from the hub's
    cache, were vLLM to serve them all from its own."""
    tokens = [*LATER[0], *LATER[1][:16]]
    other = Ids("other", "other", [*tokens, 7], [8])
    for message in messages(other, Script(cached=len(tokens))):
        hub.handle(wire.decode(wire.encode(message)))
    (trace,) = hub.traces.find("other")
    told = [json.loads(event.json) for event in trace.read(0, 1000) if event.name == "prompt"]
    cached = [one for one in told if one.get("cached")]
    assert len(cached) == len(tokens)
    return sum(one["features_at"] is not None for one in cached)


@pytest.mark.parametrize("how", ["in time", "overtaken by its rows", "lost", "never"])
def test_what_ran_under_a_change_is_nobody_elses(how: str) -> None:
    hub = Hub(Settings(), "m")
    ids = Ids("mine", "mine", *LATER)
    changed = wire.SteeringChanged(
        "c", "mine", position=40, salt=b"s", steering={"edits": ["x"], "doses": {}, "warnings": []}
    )
    sent = [wire.decode(wire.encode(message)) for message in messages(ids, Script())]
    started = next(one for one in sent if isinstance(one, wire.RequestStarted))
    for message in sent[:-4]:  # it still runs
        if how == "in time" and isinstance(message, wire.StepFeatures):
            hub.handle(changed)
            how = "told"
        hub.handle(message)
    if how == "overtaken by its rows":
        hub.handle(changed)
    elif how == "lost":
        told = msgspec.structs.replace(
            started, edited_from=40, edit_salt=b"s", steering=changed.steering
        )
        hub.handle(wire.Resync("fake", [wire.Live(told, [], 0)]))
        hub.handle(wire.Resync("fake", [wire.Live(told, [], 0)]))
    (trace,) = hub.traces.find("mine")
    events = [event for event in trace.read(0, 1000) if event.name == "steering"]
    assert len(events) == (how != "never")
    assert cached_of_another(hub) == (64 if how == "never" else 32)
