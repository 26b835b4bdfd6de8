"""Faults, one after another, in the real side process: it stays well or says what it lost."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.recording.files import Recording
from neuroscope_vllm.engine.fake import FakeEngine, Ids, Script, messages, step_features
from neuroscope_vllm.engine.serving.requests import RequestLog
from tests.server.side import Side, wait_until
from tests.server.test_limits import hello, raw_sender, resident_mb, started

NewSide = Callable[..., Side]
NAN, INF = float("nan"), float("inf")
JUMPING_CLOCK = Path(__file__).parents[1] / "support" / "jumping_clock"
KILLED = """
import sys, time
from neuroscope_vllm.engine.fake import FakeEngine, Script
engine = FakeEngine(sys.argv[1])
time.sleep(0.5)
engine.run("orphaned", [1, 2], [3, 4], Script(finish_reason=None))
time.sleep(60)
"""


def told(side: Side, name: str) -> list[dict[str, Any]]:
    """A request's events without what differs between two of them."""
    (choice,) = side.wait_done(name)
    return [
        {k: v for k, v in event.items() if k not in ("id", "request_id", "internal_id", "created")}
        for event in choice["events"]
    ]


def garbage(seed: int) -> Iterator[bytes]:
    """Ten thousand messages: random bytes, valid msgpack of the wrong type, and good messages with
    a few bytes changed."""
    rng = random.Random(seed)
    good = [
        wire.encode(one)
        for one in (
            *messages(Ids("mutant-1", "mutant", [1, 2, 3], [4, 5]), Script()),
            wire.Resync("raw", [wire.Live(started("mutant-2"), [1, 2], 0, "length")]),
            wire.SteeringChanged("c", "mutant-1", position=1),
        )
    ]
    others = [[], {}, [1], {"type": "hello"}, {"type": 1}, "text", -1, 1.5, None, b"\0" * 99]
    for n in range(10_000):
        match n % 4:
            case 0 | 1:
                yield rng.randbytes(rng.randrange(300))
            case 2:
                yield msgspec.msgpack.encode(rng.choice(others))
            case _:
                one = bytearray(rng.choice(good))
                for _ in range(rng.randint(1, 4)):
                    one[rng.randrange(len(one))] = rng.randrange(256)
                yield bytes(one)


def hostile() -> Iterator[wire.Message | bytes]:
    """Messages that are well formed and not what any engine of ours says."""
    ids = (1).to_bytes(4, "little")
    layer = wire.LayerFeatures(20, 1, ids, ids, ids, ids, b"\0")
    nan = wire.float32(b"\0\0\xc0\x7f").tobytes()

    def step(**changed: Any) -> wire.StepFeatures:
        one = wire.StepFeatures("raw", [wire.Span("odd", 0, 1)], ids, ids, [layer], 0, 1)
        return msgspec.structs.replace(one, **changed)

    replaced = msgspec.structs.replace
    deep = b"\x91" * 100_000 + b"\xc0"
    head = wire.encode(started("deep", engine="raw"))
    yield deep
    # The same inside a field that may hold anything: fixmap with one more key.
    yield bytes([head[0] + 1]) + head[1:] + b"\xa8steering\x81\xa1a" + deep
    yield b"\xdd\xff\xff\xff\xff"  # an array of four billion, declared
    yield b"\xc6\xff\xff\xff\xff"
    yield replaced(hello("odd"), wire_version=99)
    yield replaced(hello("odd-worker", "worker"), self_test=[wire.SelfTest(20, 5, NAN, INF, NAN)])
    yield replaced(started("odd"), created=NAN, layers=[-5, 10**9])
    yield replaced(started("odd-2"), created=-INF, choice=-7, stop=[""], min_tokens=-1)
    yield replaced(started("odd-3"), prompt_token_ids=b"\1\2\3")
    yield wire.RequestScheduled("odd", -(2**62))
    yield wire.RequestScheduled("odd-2", 2**62)
    yield step(spans=[wire.Span("odd", -1, 1)])
    yield step(spans=[wire.Span("odd", 1, 0)])
    yield step(layers=[replaced(layer, top_k=-1)])
    yield step(layers=[replaced(layer, top_k=2**62)])
    yield step(layers=[replaced(layer, layer=777, activation=nan, score=nan)])
    yield step(layers=[layer] * 50)
    yield step(steered=[wire.SteeredRows(-1, 20, [1], nan, nan)])
    yield step(steered=[wire.SteeredRows(9, 20, [1], nan, nan)])
    yield step(hits=[wire.RuleHit(-3, 20, 1, INF, "rule")])
    # One stage's part of a step, wrong in itself; nobody looks at it before the step is due.
    yield step(layers=[replaced(layer, top_k=5)], num_layers=2)
    yield wire.TokensSampled([wire.Sampled("odd", [2**62, -(2**62)])])
    yield wire.TokensSampled([wire.Sampled("odd-2", [1], "made up", -1, at=-9, computed_tokens=-9)])
    yield wire.Resync("raw", [wire.Live(replaced(started("odd-4"), prompt_token_ids=b"1"), [])])
    yield wire.SteeringChanged("no such", "odd", position=-(2**62))
    yield wire.Goodbye("nobody")


def test_whatever_comes_on_the_worker_socket_harms_nobody(
    new_side: NewSide, capfd: pytest.CaptureFixture[str]
) -> None:
    side = new_side()
    with FakeEngine(side.endpoint) as engine, raw_sender(side) as send:
        side.wait_armed()
        engine.run("before", [1, 2, 3] * 20, [4] * 40)
        before = told(side, "before")
        running = threading.Thread(
            target=engine.run,
            args=("meanwhile", [1, 2, 3] * 20, [4] * 40, Script(pause_s=0.05)),
        )
        running.start()
        _speak_no_zmq(side)
        heard = side.counters()["messages"]
        for one in garbage(7):
            send(one)
        for one in hostile():
            send(one)
        wait_until(lambda: side.counters()["messages"] >= heard + 10_000 + len(list(hostile())))
        send(b"\0" * (wire.MAX_MESSAGE + 1))  # which ends that connection
        running.join()
        assert told(side, "meanwhile") == before
        counters = side.counters()
        assert counters["messages_malformed"] > 7000
        assert counters.get("ticks_failed", 0) == 0
        for path in ("/v1/requests", "/v1/requests/odd", "/v1/features/describe", "/health"):
            json.loads(side.get(path).text, parse_constant=_no_constant)
        assert "speaks wire version 99" in " ".join(side.get("/health").json()["reasons"])
        # The clock still runs: what is lost ends in time.
        engine.run("lossy", [1, 2, 3], [4], Script(lost=frozenset({2})))
        assert "gap" in [event["event"] for event in told(side, "lossy")]
        assert resident_mb(side) < 400
    said = capfd.readouterr().err
    assert said.count("a malformed message") == 1
    assert said.count("Traceback") <= 3


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def _speak_no_zmq(side: Side) -> None:
    """Bytes that are no ZMTP, and a frame that declares eight exabytes."""
    path = side.endpoint.removeprefix("ipc://")
    greeting = b"\xff" + b"\0" * 8 + b"\x7f\x03\0NULL" + b"\0" * 48
    ready = b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
    for data in (b"GET / HTTP/1.1\r\n\r\n", greeting + ready + b"\2" + b"\x7f" * 8 + b"x"):
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(path)
            one.sendall(data)
            time.sleep(0.2)


def test_a_side_process_that_stands_still_catches_up(new_side: NewSide) -> None:
    """For longer than engines may be silent, while one says more than all queues hold."""
    side = new_side()
    log = RequestLog(side.endpoint, engine="fake", dp_rank=0, model="fake", command=lambda _: None)
    log.sender.start()
    prompt, output = [1, 2], list(range(10, 110)) * 50
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        log.started(started("stood-still", len(prompt), "fake"))
        log.scheduled("stood-still", 0)
        with side.open("stood-still") as events:
            assert next(events)["event"] == "request"
            assert side.process.pid is not None
            os.kill(side.process.pid, signal.SIGSTOP)
            began = time.monotonic()
            context = [0, 1, *output]
            engine.worker.put(step_features({"stood-still": [(0, 0), (1, 1)]}, [20], 8))
            for at, token in enumerate(output):
                end = at == len(output) - 1
                one = wire.Sampled("stood-still", [token], "length" if end else None)
                log.sampled([one])
                row = (len(prompt) + at, context[len(prompt) + at])
                engine.worker.put(step_features({"stood-still": [row]}, [20], 8))
            assert time.monotonic() - began < 6
            time.sleep(max(0.0, 6 - (time.monotonic() - began)))
            os.kill(side.process.pid, signal.SIGCONT)
            heard = list(events)
    tokens = [event for event in heard if event["event"] == "token"]
    assert [event["token_id"] for event in tokens] == output
    assert (heard[-1]["event"], heard[-1]["finish_reason"]) == ("done", "length")
    assert "error" not in [event["event"] for event in heard]
    gaps = [event for event in heard if event["event"] == "gap"]
    lost = {p for gap in gaps for p in range(gap["from"], gap["to"])}
    without = {event["position"] for event in tokens[:-1] if event["features_at"] is None}
    assert without == {position for position in lost if position >= len(prompt)}
    assert len(lost) == heard[-1]["dropped"] > 0
    log.sender.close()


def test_an_engine_that_was_killed_is_missed_and_its_requests_end(new_side: NewSide) -> None:
    side = new_side()
    killed = subprocess.Popen([sys.executable, "-c", KILLED, side.endpoint])
    wait_until(lambda: side.get("/v1/requests/orphaned").status_code == 200)
    with side.open("orphaned") as events:
        killed.kill()
        killed.wait()
        wait_until(lambda: side.get("/health").status_code == 503, timeout=15)
        assert any("silent" in reason for reason in side.get("/health").json()["reasons"])
        # Started again, it knows nothing of what it ran.
        with FakeEngine(side.endpoint):
            heard = list(events)
            side.wait_armed()
    assert [event["event"] for event in heard][-2:] == ["error", "done"]
    assert "went away" in heard[-2]["error"]["message"]
    assert heard[-1]["finish_reason"] == "error"


def test_a_side_process_without_memory_goes_on_when_it_has_some(new_side: NewSide) -> None:
    side = new_side()
    with FakeEngine(side.endpoint) as engine, raw_sender(side) as send:
        side.wait_armed()
        engine.run("before", [1, 2], [3])
        side.wait_done("before")
        pid = side.process.pid
        assert pid is not None
        status = Path(f"/proc/{pid}/status").read_text()
        size = int(status.partition("VmSize:")[2].split()[0]) << 10
        resource.prlimit(pid, resource.RLIMIT_AS, (size + (24 << 20), resource.RLIM_INFINITY))
        large = step_features({"ghost": [(p, p) for p in range(40_000)]}, [20], 8)
        for _ in range(5):
            send(large)
        wait_until(lambda: side.counters().get("messages_failed"))
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
        engine.run("after", [1, 2], [3])
        side.wait_done("after")
        assert side.process.pid == pid
        assert side.read("before")[-1]["event"] == "done"
        assert side.get("/health").status_code == 200


def test_a_clock_that_jumps_moves_nothing(
    new_side: NewSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jump, folder = tmp_path / "jump", tmp_path / "kept"
    jump.write_text("0")
    monkeypatch.setenv("JUMP", str(jump))
    monkeypatch.setenv("PYTHONPATH", str(JUMPING_CLOCK))
    side = new_side(settings={"record": str(folder)})
    with FakeEngine(side.endpoint) as engine, side.open() as events:
        side.wait_armed()
        script = Script(pause_s=0.1)
        running = threading.Thread(target=engine.run, args=("jumpy", [1, 2], [3] * 30, script))
        running.start()
        for offset in (-86_400, 86_400 * 3, -3600):
            time.sleep(0.5)
            jump.write_text(str(offset))
        heard = []
        while not heard or heard[-1]["event"] != "done":
            heard.append(next(events))
        running.join()
        assert side.get("/health").json() == {"status": "ok", "armed": True, "reasons": []}
    names = [event["event"] for event in heard]
    assert names == ["request", "prompt", "prompt", *["token"] * 30, "done"]
    side.process.stop()
    (place,) = (recording := Recording(folder)).places
    times = [event.time for event in recording.read(place).events]
    assert times == sorted(times)
    assert times[-1] - times[0] < 60
