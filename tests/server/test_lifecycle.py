"""The side process among others: engines that come and go, its own end and return."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from neuroscope_vllm.core import launch, wire
from neuroscope_vllm.engine.fake import FakeEngine, Script
from tests.server.side import Side, http, parse_sse, wait_until
from tests.support.served import lines

NewSide = Callable[..., Side]
PARENT = """
import sys, time
from pathlib import Path
from neuroscope_vllm.core import launch
from neuroscope_vllm.core.config import Settings
listener = launch.listen("127.0.0.1", 0)
directory = Path(sys.argv[1])
side = launch.launch(Settings(), model="m", directory=directory, listener=listener,
                     tokenizer_file=None, upstream=None, labels={})
assert launch.wait_for_socket(directory)
print(listener.getsockname()[1], side.pid, flush=True)
time.sleep(60)
"""


def test_health_follows_the_workers(new_side: NewSide):
    side = new_side()
    answer = side.get("/health")
    assert answer.status_code == 503
    assert answer.json()["status"] == "starting"
    with FakeEngine(side.endpoint, armed=False):
        wait_until(lambda: side.get("/health").json()["status"] == "degraded")
        assert "not armed" in side.get("/health").json()["reasons"][0]
    with FakeEngine(side.endpoint):
        side.wait_armed()
        assert side.get("/health").json() == {"status": "ok", "armed": True, "reasons": []}
        assert side.get("/ready").status_code == 200
    wait_until(lambda: side.get("/health").status_code == 503)


def test_the_socket_is_private(side: Side):
    path = Path(side.endpoint.removeprefix("ipc://"))
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_starts_within_a_second_of_cpu_time(tmp_path: Path):
    code = "import neuroscope_vllm.server.__main__, sys, time; print(time.process_time());"
    code += "print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = out.stdout.splitlines()
    assert float(seconds) < 1
    assert heavy == "set()"


def test_malformed_messages_are_counted_and_harm_nobody(side: Side, engine: FakeEngine):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(side.endpoint)
    before = side.counters().get("messages_malformed", 0)
    ids = (1).to_bytes(4, "little")
    good = wire.LayerFeatures(20, 1, ids, ids, ids, ids, b"\0")
    short = wire.LayerFeatures(20, 2, ids, ids, ids, ids, b"\0")
    span = wire.Span("a", 0, 1)
    bad = [
        b"",
        b"\xff\x00",
        wire.encode(wire.TokensSampled([]))[:-1],
        wire.encode(wire.StepFeatures("e", [span], ids, b"", [good], 0, 1)),
        wire.encode(wire.StepFeatures("e", [span], ids, ids, [short], 0, 1)),
        wire.encode(wire.StepFeatures("e", [wire.Span("a", 0, 2)], ids, ids, [good], 0, 1)),
        wire.encode(wire.StepFeatures("e", [span], b"\1\2\3", ids, [good], 0, 1)),
    ]
    for data in bad:
        socket.send(data)
    wait_until(lambda: side.counters().get("messages_malformed", 0) == before + len(bad))
    engine.run("unharmed", [1, 2], [3])
    side.wait_done("unharmed")
    socket.close(linger=0)
    context.term()


def test_its_log_tells_the_time(new_side: NewSide, capfd: pytest.CaptureFixture[str]):
    new_side()
    first = capfd.readouterr().err.splitlines()[0]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO neuroscope: features of", first)


def test_sigterm_says_goodbye_and_ends_in_time(new_side: NewSide):
    side = new_side()
    with side.open() as everything, side.open("one") as one:
        began = time.monotonic()
        side.process.stop()
        assert time.monotonic() - began < 2
        for events in (everything, one):
            assert [(e["event"], e["reason"]) for e in events] == [("goodbye", "shutdown")]


def test_a_dead_parent_ends_it(tmp_path: Path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    port, pid = map(int, parent.stdout.readline().split())
    url = f"http://127.0.0.1:{port}/v1/features/stream"
    with http.stream("GET", url) as response:
        parent.kill()
        parent.wait()
        began = time.monotonic()
        events = list(parse_sse(lines(response)))
    assert [event["event"] for event in events] == ["goodbye"]
    wait_until(lambda: not _runs(pid), timeout=2)
    assert time.monotonic() - began < 2
    parent.stdout.close()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_is_left_to_the_parent(new_side: NewSide):
    side = new_side()
    pid = side.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert side.process.pid == pid
    assert side.get("/version").status_code == 200


def test_a_killed_hub_comes_back_and_engines_with_it(new_side: NewSide):
    side = new_side()
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        engine.run("first", [1, 2], [3])
        side.wait_done("first")
        last = side.read("first")[1]["id"]
        old = side.process.pid
        assert old is not None
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: side.process.pid != old)
        side.wait_armed()
        engine.run("second", [1, 2], [3])
        side.wait_done("second")
        assert side.read("second")[-1]["event"] == "done"
        # A reader of the stream of all learns that this is not the process it knew.
        with side.open(headers={"Last-Event-ID": last}) as events:
            assert (event := next(events))["event"] == "gap"
            assert event["reason"] == "restarted"
            assert next(events)["request_id"] == "second"


def test_a_hub_that_ends_again_and_again_is_given_pauses(
    new_side: NewSide, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    side = new_side()

    def kill() -> float:
        old, began = side.process.pid, time.monotonic()
        assert old is not None
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: side.process.pid != old)
        return time.monotonic() - began

    kill()
    assert kill() > 1
    monkeypatch.setattr(launch, "WELL_S", 0.0)
    kill()
    logged = [record.getMessage() for record in caplog.records if record.name == launch.__name__]
    assert [line.rpartition(" in ")[2] for line in logged] == ["0 s.", "1 s.", "0 s."]
    assert "the side process ended (-9)" in logged[0]


def test_requests_of_an_engine_that_leaves_end_with_an_error(new_side: NewSide):
    side = new_side()
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        script = Script(finish_reason=None)
        engine.run("cut", [1, 2], [3, 4], script)
        wait_until(lambda: side.get("/v1/requests/cut").status_code == 200)
    events = side.read("cut")
    error = next(event for event in events if event["event"] == "error")
    assert error["error"]["type"] == "server_error"
    assert events[-1]["finish_reason"] == "error"


def test_the_stream_carries_the_parents_settings(new_side: NewSide):
    side = new_side(settings={"top_k": 3})
    assert side.get("/v1/features/stream?request_id=x&top_k=4").status_code == 400
    assert launch.endpoint_of(side.process.directory) == side.endpoint
