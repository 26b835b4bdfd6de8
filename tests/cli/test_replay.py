"""`neuroscope replay`: what was recorded is told again, as it was."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.access import SECRET_HEADER
from neuroscope_vllm.core.recording.files import read_traces, write_traces
from neuroscope_vllm.engine.fake import FakeEngine, Script
from tests.server.side import make_tokenizer, parse_sse, start_side
from tests.support.recorded import (
    CREATED,
    EPOCH,
    about,
    make_trace,
    replaying,
    told_whole,
    write_recorded,
)

http = httpx.Client(trust_env=False, timeout=30)
SECRET = "a-secret-of-one-stream"
SHOWN = {SECRET_HEADER: SECRET}


@contextmanager
def stream(base: str, **params: Any) -> Iterator[Iterator[dict[str, Any]]]:
    with http.stream("GET", f"{base}/v1/features/stream", params=params) as answer:
        assert answer.status_code == 200, answer.read()
        yield parse_sse(_lines(answer))


def _lines(answer: httpx.Response) -> Iterator[str]:
    """httpx's own also breaks lines at U+2028, which tokens may hold."""
    rest = b""
    for chunk in answer.iter_raw():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode() for line in lines)


def read(base: str, request_id: str, **params: Any) -> list[dict[str, Any]]:
    with stream(base, request_id=request_id, **params) as events:
        return list(events)


def answered(folder: Path, request_id: str) -> bytes:
    return b'{"choices":[%b]}' % b",".join(one.json for one in read_traces(folder, request_id))


def events_of(answer: bytes) -> list[dict[str, Any]]:
    return [event for choice in json.loads(answer)["choices"] for event in choice["events"]]


def test_a_server_s_traces_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once, then a pause of which a second is left."""
    monkeypatch.setenv("NEUROSCOPE_RUNTIME", "")
    monkeypatch.setattr("tests.server.side.http", http)
    runtime, folder = tmp_path / "side", tmp_path / "kept"
    runtime.mkdir()
    tokenizer = tmp_path / "tokenizer.json"
    make_tokenizer().save(str(tokenizer))
    settings = {"record": str(folder), "top_k": 5}
    side = start_side(runtime, settings=settings, tokenizer_file=tokenizer)
    try:
        with FakeEngine(side.endpoint, layers=(5, 20), top_k=5) as engine:
            side.wait_armed()
            for choice in (0, 1):
                script = Script(choice=choice, lost=frozenset({2}), pause_s=0.02)
                engine.run("chatcmpl-a", [40] * 9, [50] * 20, script)
            engine.run("chatcmpl-hidden", [40] * 9, [50], Script(secret=SECRET))
            side.wait_done("a", 2)
            told = {"a": side.get("/v1/requests/a").content}
            told["hidden"] = side.get("/v1/requests/hidden", headers=SHOWN).content
            said = side.get("/v1/features/describe").json()
    finally:
        side.process.stop()
    with replaying(folder, "--speed", "10", log=tmp_path / "log") as base:
        assert told_whole(base, "a") == told["a"]
        assert http.get(f"{base}/health").status_code == 200
        again = http.get(f"{base}/v1/features/describe").json()
        for name in ("model", "epoch", "sites", "top_k", "special_token_ids"):
            assert again[name] == said[name], name
        assert (again["replay"], again["armed"], again["recording"]) == (True, True, None)
        streamed = sorted(read(base, "chatcmpl-a"), key=lambda event: event["id"])
        assert streamed == sorted(events_of(told["a"]), key=lambda event: event["id"])
        middle = events_of(told["a"])[30]["id"]
        rest = read(base, "a", last_event_id=middle, include="token")
        assert min(int(event["id"].split("-")[1]) for event in rest) > int(middle.split("-")[1])
        assert {event["event"] for event in rest} >= {"token", "done"}
        refused = http.put(f"{base}/v1/requests/a/steering", json={})
        assert refused.status_code == 409
        assert http.get(f"{base}/v1/models").status_code == 503
        check_hidden(base, told["hidden"])


def check_hidden(base: str, told: bytes) -> None:
    """A request with a stream secret is for who shows it, as it was."""
    url = f"{base}/v1/requests/hidden"
    for headers in ({}, {SECRET_HEADER: "another-secret-of-none"}):
        assert http.get(url, headers=headers).status_code == 404
        assert "hidden" not in http.get(f"{base}/v1/requests", headers=headers).text
        assert http.get(f"{base}/export/hidden", headers=headers).status_code == 404
    params = {"request_id": "hidden"}
    streamed = http.get(f"{base}/v1/features/stream", params=params, headers=SHOWN).text
    assert streamed.count("event: done") == 1  # and so it is told
    assert b'"done"' in told
    assert http.get(url, headers=SHOWN).content == told
    assert "hidden" in http.get(f"{base}/v1/requests", headers=SHOWN).text


def test_it_takes_the_time_it_took_and_does_several_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    traces = [
        make_trace(90, request_id="chatcmpl-one", seq=0),
        make_trace(90, request_id="chatcmpl-two", seq=1000, began=CREATED + 0.5),
        make_trace(60, request_id="chatcmpl-later", seq=2000, began=CREATED + 1e6),
    ]
    # As one hub would have numbered them.
    everything = sorted(
        (event for trace in traces for event in trace.events), key=lambda event: event.time or 0
    )
    for seq, event in enumerate(everything):
        event.seq = seq
    for trace in traces:
        write_traces(folder, about(), [trace])
    with replaying(folder, "--speed", "2", log=tmp_path / "log") as base:
        time.sleep(0.5)  # nothing is told to nobody
        arrived: list[tuple[float, dict[str, Any]]] = []
        with stream(base) as events:
            for event in events:
                arrived.append((time.monotonic(), event))
                if event["event"] == "done" and event["request_id"] == "chatcmpl-later":
                    break
        assert [event["id"] for _, event in arrived] == [f"{EPOCH}-{n}" for n in range(240 + 6)]
        start = arrived[0][0]
        at = {(e["event"], e["request_id"]): t - start for t, e in arrived if e["event"] != "token"}
        assert at["done", "chatcmpl-one"] == pytest.approx(1.1 / 2, abs=0.2)
        assert at["request", "chatcmpl-two"] == pytest.approx(0.5 / 2, abs=0.2)
        assert at["done", "chatcmpl-two"] == pytest.approx(1.6 / 2, abs=0.2)
        assert at["request", "chatcmpl-later"] == pytest.approx(2.6 / 2, abs=0.3)
        order = [e["request_id"] for _, e in arrived if e["event"] == "token"]
        turns = sum(a != b for a, b in itertools.pairwise(order))
        assert turns > 20  # they ran at the same time
        listed = http.get(f"{base}/v1/requests").json()["data"]
        assert [one["request_id"] for one in listed] == [
            "chatcmpl-later",
            "chatcmpl-two",
            "chatcmpl-one",
        ]


def test_recordings_of_several_servers_are_told_together(tmp_path: Path) -> None:
    """Their events have numbers of their own, which clash."""
    folder = tmp_path / "kept"
    traces = []
    for epoch in ("aaaaaaaa", "bbbbbbbb"):
        trace = make_trace(120, request_id=f"chatcmpl-{epoch}")
        for event in trace.events:
            event.epoch = epoch
        head = msgspec.structs.replace(trace.head, epoch=epoch)
        traces.append(trace._replace(head=head))
        write_traces(folder, about(), [traces[-1]])
    with replaying(folder, "--speed", "0", log=tmp_path / "log") as base:
        for trace in traces:
            name = trace.head.request_id
            assert told_whole(base, name) == b'{"choices":[%b]}' % trace.json
            assert [event["id"].encode() for event in read(base, name)] == [
                event.id for event in trace.events
            ]
            resumed = read(base, name, last_event_id=traces[0].events[50].id.decode())
            assert (resumed[0]["event"], resumed[0]["reason"]) == ("gap", "restarted")
            assert len(resumed) == 1 + len(trace.events)


def test_one_request_of_many_and_without_text(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    for name in ("one", "two", "three"):
        write_recorded(folder, 50, request_id=f"chatcmpl-{name}", prompt=10, redact="text")
    options = ("--request", "two", "--request", "chatcmpl-three", "--speed", "0")
    with replaying(folder, *options, log=tmp_path / "log") as base:
        answer = told_whole(base, "two")
        assert answer == answered(folder, "two")
        tokens = [event for event in events_of(answer) if "token" in event]
        assert len(tokens) == 50
        assert {(event["token"], event["token_id"]) for event in tokens} == {("▮ ", -1)}
        assert any(event["top_features"] for event in tokens)
        told_whole(base, "three")
        assert http.get(f"{base}/v1/requests/one").status_code == 404


def test_ten_thousand_tokens(tmp_path: Path) -> None:
    trace = write_recorded(tmp_path / "kept", 10_000)
    with replaying(tmp_path / "kept", "--speed", "0", log=tmp_path / "log") as base:
        start = time.monotonic()
        assert told_whole(base, "recorded") == b'{"choices":[%b]}' % trace.json
        print(f"told after {time.monotonic() - start:.1f} s")
        page = http.get(f"{base}/")
        assert page.status_code == 200
        found = http.get(f"{base}/v1/features/labels", params={"q": "x"})
        assert found.status_code == 200


def refusal(*words: str) -> str:
    result = CliRunner().invoke(main, ["replay", *words])
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_what_can_not_be_told_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    write_recorded(folder, 20, prompt=5)
    assert "request 'nope' is not in" in refusal(str(folder), "--request", "nope")
    assert "does not exist" in refusal(str(tmp_path / "no"))
    (tmp_path / "empty").mkdir()
    assert "holds no recording" in refusal(str(tmp_path / "empty"))
    (tmp_path / "text.parquet").write_text("no parquet")
    assert "can not be read" in refusal(str(tmp_path / "text.parquet"))
    assert "--speed" in refusal(str(folder), "--speed", "-1")
    (file,) = folder.glob("*/*.parquet")
    file.write_bytes(file.read_bytes()[:-10])
    assert "can not be read" in refusal(str(folder))


def test_a_file_that_turns_out_to_be_damaged_ends_it(tmp_path: Path) -> None:
    """After what was before it was told."""
    write_recorded(tmp_path / "kept", 20, prompt=5)
    later = make_trace(20, request_id="chatcmpl-later", began=CREATED + 60)
    file = write_traces(tmp_path / "kept", about(), [later], when=CREATED + 86400)
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(100) + content[200:])
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "replay", str(tmp_path / "kept")]
    ended = subprocess.run(
        [*words, "--speed", "0", "--features-port", "0"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1
    assert f"neuroscope: the replay ended: {file} can not be read" in ended.stderr
    assert "Traceback" not in ended.stderr
