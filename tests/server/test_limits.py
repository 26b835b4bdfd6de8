"""Ceilings: whatever is asked or sent, the side process stays within its memory, and counts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import zmq

from neuroscope_vllm.core import sender as sender_module
from neuroscope_vllm.core import wire
from neuroscope_vllm.core.config import Settings, resolve
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sender import Sender
from neuroscope_vllm.engine.fake import FakeEngine, Ids, Script, messages, step_features
from neuroscope_vllm.server import cards, commands
from neuroscope_vllm.server.hub import MAX_ID, Hub
from neuroscope_vllm.server.routes.page import MAX_EXPORTS
from neuroscope_vllm.server.senders import MAX_SENDERS
from tests.server.side import Side, wait_until

NewSide = Callable[..., Side]
ASK = b"GET /v1/features/stream%b HTTP/1.1\r\nHost: localhost\r\n%b\r\n"


@contextlib.contextmanager
def raw_sender(side: Side) -> Iterator[Callable[[wire.Message | bytes], None]]:
    """Sends anything to the hub, as fast as it takes it."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDTIMEO, 60_000)
        dealer.connect(side.endpoint)
        yield lambda one: dealer.send(one if isinstance(one, bytes) else wire.encode(one))


def started(internal_id: str, prompt: int = 4, engine: str = "raw") -> wire.RequestStarted:
    ids = np.arange(prompt, dtype="<i4").tobytes()
    return wire.RequestStarted(internal_id, internal_id, 0, engine, 0, ids, 0.0, [20])


def hello(sender: str, role: str = "scheduler") -> wire.Hello:
    return wire.Hello(sender, role, "raw", 0, "m")


def resident_mb(side: Side) -> float:
    status = Path(f"/proc/{side.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def limits(side: Side) -> dict[str, Any]:
    return side.get("/v1/features/describe").json()["limits"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_readers": 0}, "max_readers is 0"),
        ({"ring_mb": 0}, "ring_mb is 0"),
        ({"memory_mb": 8, "ring_mb": 5, "prefix_mb": 2, "running_mb": 1}, "memory_mb is 8, which"),
    ],
)
def test_limits_that_can_not_be_are_refused(given: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(given, {})


def test_readers_past_the_limit_are_told_to_come_again(new_side: NewSide) -> None:
    side = new_side(settings={"max_readers": 2})
    with side.open(), side.open("waited-for"):
        for query in ("", "?request_id=another"):
            answer = side.get(f"/v1/features/stream{query}")
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            error = answer.json()["error"]
            assert error["type"] == "server_error"
            assert "max_readers" in error["message"]
        assert side.counters()["readers_refused"] == 2
        assert 'neuroscope_refused_at_limit_total{what="readers"} 2.0' in side.get("/metrics").text
        assert limits(side)["readers"] == limits(side)["max_readers"] == 2
        assert side.get("/v1/requests").status_code == 200
    wait_until(lambda: limits(side)["readers"] == 0)
    with side.open():
        pass


def test_a_request_that_finds_no_room_is_told_of_and_refused_nothing_else(
    new_side: NewSide,
) -> None:
    side = new_side(settings={"memory_mb": 8})
    with FakeEngine(side.endpoint) as engine, raw_sender(side) as send:
        side.wait_armed()
        send(hello("s"))
        for n in range(200):
            send(started(f"short-{n}"))
        wait_until(lambda: side.counters().get("requests_refused"))
        engine.run("refused", [1, 2], [3])
        (choice,) = side.wait_done("refused")
        assert [event["event"] for event in choice["events"]] == ["request", "error", "done"]
        assert "no room" in choice["events"][1]["error"]["message"]
        assert choice["events"][2]["finish_reason"] == "error"
        assert choice["events"][2]["dropped"] == 2
        send(wire.Goodbye("s"))  # those that ran end, and there is room again
        wait_until(lambda: limits(side)["running_bytes"] == 0)
        engine.run("followed", [1, 2], [3])
        assert side.wait_done("followed")[0]["events"][-1]["finish_reason"] == "length"


def test_cards_past_the_limit_are_refused_and_counted(new_side: NewSide) -> None:
    side = new_side()

    async def ask() -> list[str]:
        async with httpx.AsyncClient(base_url=side.base, trust_env=False, timeout=60) as http:
            asked = (http.get("/v1/features/1") for _ in range(cards.MAX_WAITING + 3))
            return [one.text for one in await asyncio.gather(*asked)]

    with FakeEngine(side.endpoint):
        side.wait_armed()
        said = asyncio.run(ask())
    assert sum("others wait for a card" in one for one in said) == 3
    assert side.counters()["cards_refused"] == 3
    assert 'neuroscope_refused_at_limit_total{what="cards"} 3.0' in side.get("/metrics").text


def test_changes_of_steering_past_the_limit_are_refused_and_counted() -> None:
    hub = Hub(Settings(), "m")
    hub.commands.send = lambda engine, data: True  # it is sent, and never answered

    async def ask() -> None:
        async with asyncio.TaskGroup() as group:
            waiting = [
                group.create_task(hub.commands.steer("r", "e", None))
                for _ in range(commands.MAX_WAITING)
            ]
            await asyncio.sleep(0)
            with pytest.raises(ConnectionError):
                await hub.commands.steer("r", "e", None)
            for one in waiting:
                one.cancel()

    asyncio.run(ask())
    assert hub.counters["steering_refused"] == 1


def test_what_an_engine_sends_without_end_stays_within_the_ceiling(new_side: NewSide) -> None:
    """Hellos of ever new names, requests that never end, rows of requests that never come, steps
    of which one stage speaks, ids of any length."""
    memory = 32
    side = new_side(settings={"memory_mb": memory})
    with FakeEngine(side.endpoint) as engine, raw_sender(side) as send:
        side.wait_armed()
        before = resident_mb(side)
        for n in range(100_000):
            send(hello(f"s-{n}", "scheduler" if n % 2 else "worker"))
        for n in range(10_000):
            send(started(f"endless-{n}", prompt=100))
        for n in range(400):
            send(step_features({f"ghost-{n}": [(p, p) for p in range(200)]}, [20], 8))
            one = step_features({"endless-1": [(p + 1000, p) for p in range(200)]}, [20], 8)
            send(one)
            one.engine, one.step, one.num_layers = f"engine-{n % 50}", n, 2
            send(one)
            send(started(f"{'x' * MAX_ID * 8}-{n}"))
        wait_until(lambda: side.counters()["messages"] >= 111_600, timeout=120)
        counters, kept = side.counters(), limits(side)
        assert counters["senders_refused"] >= 100_000 - MAX_SENDERS
        assert counters["requests_refused"] > 400
        assert counters["rows_of_unknown_request"] > 0
        assert counters["rows_held_too_long"] > 0
        assert counters["steps_incomplete"] > 0
        told = f"neuroscope_hub_steps_incomplete_total {float(counters['steps_incomplete'])}"
        assert told in side.get("/metrics").text
        assert kept["running_bytes"] <= memory * 2**20 / 8
        assert kept["kept_bytes"] + kept["prefix_bytes"] <= memory * 2**20 * 7 / 8
        grown = resident_mb(side) - before
        print(f"resident memory grew by {grown:.0f} MB under a ceiling of {memory}")
        assert grown < 2 * memory + 40
        engine.run("unharmed", [1, 2], [3])
        side.wait_done("unharmed")


def test_readers_that_never_read_cost_a_bounded_part_each(new_side: NewSide) -> None:
    side, count = new_side(settings={"memory_mb": 16}), 150
    with FakeEngine(side.endpoint) as engine, contextlib.ExitStack() as stack:
        side.wait_armed()
        engine.run("warm", [1] * 3000, [2])
        side.wait_done("warm")
        before = resident_mb(side)
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", side.port))
            one.sendall(ASK % (b"", b""))
        wait_until(lambda: limits(side)["readers"] == count)
        for n in range(8):
            engine.run(f"flood-{n}", [1] * 3000, [2], Script(chunk=500))
        side.wait_done("flood-7")
        each = (resident_mb(side) - before - 16) * 1024 / count
        print(f"a reader that never reads: {each:.0f} KiB")
        assert each < 400
        assert side.get("/health").status_code == 200
        # Ten seconds without a byte taken, and they are dropped.
        wait_until(lambda: side.counters().get("readers_timed_out", 0) == count, timeout=40)
        assert limits(side)["readers"] == 0


def test_who_fetches_a_trace_and_takes_nothing_costs_a_bounded_part(new_side: NewSide) -> None:
    side, count = new_side(settings={"memory_mb": 64, "max_readers": 24}), 24
    with FakeEngine(side.endpoint) as engine, contextlib.ExitStack() as stack:
        side.wait_armed()
        engine.run("long", [1] * 12_000, [2], Script(chunk=500))
        side.wait_done("long")
        whole = len(side.get("/v1/requests/long").content)
        assert whole > 5e6
        before = resident_mb(side)
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", side.port))
            one.sendall(b"GET /v1/requests/long HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: limits(side)["readers"] == count)
        assert side.get("/v1/requests/long").status_code == 503
        assert (resident_mb(side) - before) * 2**20 < count * whole / 4
        wait_until(lambda: side.counters().get("readers_timed_out", 0) == count, timeout=40)
        assert limits(side)["readers"] == 0
        assert len(side.get("/v1/requests/long").content) == whole


def test_exports_past_the_limit_are_refused(new_side: NewSide) -> None:
    side = new_side()

    async def ask() -> list[int]:
        async with httpx.AsyncClient(base_url=side.base, trust_env=False, timeout=60) as http:
            asked = (http.get("/export/some") for _ in range(MAX_EXPORTS + 2))
            return [one.status_code for one in await asyncio.gather(*asked)]

    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        engine.run("some", [1] * 2000, [2], Script(chunk=500))
        side.wait_done("some")
        assert sorted(asyncio.run(ask())) == [200] * MAX_EXPORTS + [503] * 2
        assert asyncio.run(ask()).count(200) == MAX_EXPORTS  # their places are free again


def test_readers_that_vanish_are_forgotten(side: Side, engine: FakeEngine) -> None:
    before = limits(side)["readers"]
    vanishing = []
    for _ in range(50):
        one = socket.create_connection(("127.0.0.1", side.port))
        one.sendall(ASK % (b"", b""))
        vanishing.append(one)
    wait_until(lambda: limits(side)["readers"] == before + 50)
    for one in vanishing:  # RST, not FIN
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
    engine.run("after-vanishing", [1, 2], [3])
    wait_until(lambda: limits(side)["readers"] == before)


def test_a_storm_of_readers_that_come_again_loses_nothing(new_side: NewSide) -> None:
    """Each breaks off after a few events and goes on with Last-Event-ID, again and again."""
    readers, times, tokens = 500, 5, 60
    side = new_side()
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        engine.run("storm", [1], list(range(2, 2 + tokens)))
        side.wait_done("storm")
        before = resident_mb(side)
        seen = asyncio.run(_storm(side.port, readers, times))
        whole = [event["id"] for event in side.read("storm")]
    assert all(one == whole for one in seen)
    assert limits(side)["readers"] == 0
    grown = resident_mb(side) - before
    print(f"{readers * times} connections; resident memory grew by {grown:.0f} MB")
    assert grown < 60


async def _storm(port: int, readers: int, times: int) -> list[list[str]]:
    turn = asyncio.Semaphore(100)

    async def follow() -> list[str]:
        seen: list[str] = []
        for again in range(times):
            async with turn:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                last = f"Last-Event-ID: {seen[-1]}\r\n".encode() if seen else b""
                writer.write(ASK % (b"?request_id=storm", last))
                wanted = 3 if again < times - 1 else 1 << 30
                while wanted and (line := await reader.readline()):
                    if line.startswith(b"id: "):
                        seen.append(line[4:].decode().strip())
                        wanted -= 1
                    elif line == b"0\r\n":
                        break
                writer.transport.abort()
        return seen

    return await asyncio.gather(*(follow() for _ in range(readers)))


def test_a_name_used_again_and_again_costs_its_reader_nothing() -> None:
    """One who waits for more under a name keeps no request that was told."""
    hub = Hub(Settings(), "m")
    reader = hub.subscribe("same")
    for n in range(50):
        for message in messages(Ids(f"same-{n}", "same", [1, 2], [3]), Script()):
            hub.handle(message, now=time.monotonic())
        while reader.take(1000):
            pass
    assert not reader.ended
    assert len(reader._cursors) == 0


def test_put_neither_blocks_nor_grows_while_the_hub_stands_still(new_side: NewSide) -> None:
    side = new_side()
    sender = Sender(side.endpoint, lambda counters: hello("me", "worker"))
    sender.start()
    wait_until(lambda: limits(side) and side.get("/v1/features/describe").json()["senders"])
    small = step_features({"a": [(0, 1)]}, [20], 8)
    large = step_features({"a": [(p, p) for p in range(4096)]}, [20], 8)
    assert side.process.pid is not None
    os.kill(side.process.pid, signal.SIGSTOP)
    try:
        began, wall = time.thread_time(), time.monotonic()
        for _ in range(20_000):
            sender.put(small)
        each = (time.thread_time() - began) / 20_000
        print(f"put: {each * 1e6:.1f} µs of the thread's time")
        assert each < 30e-6
        assert time.monotonic() - wall < 10
        assert sender.counters["messages_dropped"] > 10_000
        # What waits is bounded by its size, too: the thread that ships can go no further.
        for _ in range(2000):
            sender.put(large)
        with sender._queue.mutex:
            waiting = sum(map(wire.weight, sender._queue.queue))
        assert waiting <= sender_module.QUEUED_BYTES + wire.weight(large)
    finally:
        os.kill(side.process.pid, signal.SIGCONT)
    # A full queue, and nobody who empties it.
    idle = Sender(side.endpoint, lambda counters: hello("idle", "worker"), capacity=4)
    assert [idle.put(small) for _ in range(6)] == [True] * 4 + [False] * 2
    assert idle.counters["messages_dropped"] == 2
    sender.close()


def test_a_request_of_many_choices_holds_nobody_up(new_side: NewSide):
    """Its stream is one of all of them, in the order that they were told."""
    side = new_side(settings={"trace_requests": 400})
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        for choice in range(300):
            engine.run("many", list(range(100)), [7], Script(choice=choice, pause_s=0.005))
        wait_until(lambda: side.counters()["requests_done"] >= 300)
    answered: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            began = time.monotonic()
            assert side.get("/version").status_code == 200
            answered.append(time.monotonic() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    began = time.monotonic()
    events = side.read("many")
    took = time.monotonic() - began
    done.set()
    asking.join()
    seqs = [int(event["id"].partition("-")[2]) for event in events]
    assert seqs == sorted(set(seqs))
    assert len(seqs) == 300 * (1 + 101 + 1)
    print(f"{len(seqs)} events in {took:.1f} s; {len(answered)} answers, {max(answered):.2f} s")
    assert len(answered) > 10  # one, if all are sorted for each few that are sent
