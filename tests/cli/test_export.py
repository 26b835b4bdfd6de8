"""`neuroscope export`: a request as a page, as lines, as parquet; from a server and from disk."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.recording.files import read_traces, write_traces
from tests.client.speaker import speaker
from tests.support.browser import needs_browser, opened
from tests.support.recorded import (
    HOSTILE,
    about,
    make_trace,
    replaying,
    told_whole,
    write_recorded,
)


def export(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["export", *words])
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A request of two choices and two layers, and another one."""
    folder = tmp_path_factory.mktemp("recorded") / "kept"
    choices = [make_trace(150, layers=(5, 20), choice=n, seq=1000 * n) for n in (0, 1)]
    other = make_trace(30, request_id="cmpl-other", prompt=5, seq=5000)
    write_traces(folder, about((5, 20)), [*choices, other])
    return folder


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "log"
    with replaying(folder, "--speed", "0", log=log) as base:
        told_whole(base, "recorded")
        yield base


@pytest.fixture(params=["server", "recording"])
def source(request: pytest.FixtureRequest, folder: Path, base: str) -> tuple[str, str]:
    return ("--url", base) if request.param == "server" else ("--record", str(folder))


def test_lines_are_the_events(source: tuple[str, str], base: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    code, out, err = export("recorded", *source, "--jsonl", str(file))
    assert (code, out) == (0, ""), err
    answer = httpx.get(f"{base}/v1/requests/recorded", trust_env=False).json()
    lines = file.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [
        event for choice in answer["choices"] for event in choice["events"]
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    code, out, _ = export("chatcmpl-recorded", *source, "--jsonl", "-")
    assert (code, out) == (0, file.read_text(encoding="utf-8"))


def test_parquet_is_a_recording(source: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.parquet"
    code, _, err = export("recorded", *source, "--parquet", str(file))
    assert code == 0, err
    assert [one.json for one in read_traces(file)] == [
        one.json for one in read_traces(folder, "recorded")
    ]
    table = pq.read_table(file)
    tokens = [row for row in table.to_pylist() if row["event"] in ("prompt", "token")]
    expected = list(read_traces(folder, "recorded"))
    told = [json.loads(e.json) for t in expected for e in t.events if e.name in ("prompt", "token")]
    assert len(tokens) == len(told) == 2 * 2 * 150
    for row, event in zip(tokens, told, strict=True):
        assert row["json"] is None
        for name in ("request_id", "choice", "position", "token", "token_id", "layer", "l0"):
            assert row[name] == event[name], name
        assert row["token_index"] == event["token_index"]
        for one, other in zip(row["top_features"], event["top_features"], strict=True):
            assert one == {"dense": False, "unreliable": False} | other
    times = table["time"].to_pylist()
    assert all(time is None for time in times) == (source[0] == "--url")  # a server tells no times


def test_an_exported_file_is_told_again(base: str, tmp_path: Path) -> None:
    """Also one that knows no times."""
    file = tmp_path / "trace.parquet"
    assert export("recorded", "--url", base, "--parquet", str(file))[0] == 0
    before = httpx.get(f"{base}/v1/requests/recorded", trust_env=False).content
    with replaying(file, log=tmp_path / "log") as again:
        assert told_whole(again, "recorded") == before


@needs_browser
@pytest.mark.parametrize("redact", ["none", "text"])
def test_the_page_shows_hostile_text_as_text(redact: Any, tmp_path: Path) -> None:
    write_recorded(tmp_path / "kept", 150, layers=(5, 20), redact=redact)
    file = tmp_path / "page.html"
    words = ("recorded", "--record", str(tmp_path / "kept"), "--html", str(file))
    code, out, err = export(*words)
    assert (code, out) == (0, ""), err
    profile = tmp_path / "profile"
    with opened(file, profile) as page:
        assert page.run("window.owned") is None
        assert page.run("document.querySelectorAll('img, iframe, b').length") == 0
        assert page.run("document.querySelectorAll('.t').length") == 150
        shown = page.run("[...document.querySelectorAll('.t')].map(t => t.textContent).join('|')")
        about = page.run("document.querySelector('header').textContent")
        assert "2026" in about
        if redact == "text":
            assert HOSTILE[0] not in shown
            assert shown.count("▮") == 150
            assert "recorded without text" in about
        else:
            assert HOSTILE[0] in shown
            assert HOSTILE[1] in shown
        page.run("document.querySelectorAll('.t')[60].focus()")
        assert page.run("document.querySelectorAll('#features button').length") == 8
        assert page.faults == []
        assert page.requests == [file.as_uri()]


def test_choices_share_a_page(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    words = ("recorded", "--record", str(folder), "--html", str(file), "--jsonl", "-")
    code, out, _ = export(*words)
    assert code == 0
    assert out.count("\n") == 2 * (2 * 150 + 2)
    content = file.read_text(encoding="utf-8")
    assert '"heading":"choice 0"' in content
    assert '"heading":"choice 1"' in content


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("recorded",), 2, "say what to write"),
        (("recorded", "--html", "/no/such/folder/x.html"), 1, "can not be a file"),
        (("recorded", "--html", "/"), 1, "can not be a file"),
        (("recorded", "--jsonl", "-", "--url", "http://127.0.0.1:9"), 1, "no feature stream"),
        (("recorded", "--jsonl", "-", "--url", "nonsense"), 1, "no feature stream"),
        (("recorded", "--jsonl", "-", "--record", "/no/such"), 2, "does not exist"),
    ],
)
def test_what_can_not_be_written_is_said(words: tuple[str, ...], code: int, said: str) -> None:
    found, out, err = export(*words)
    assert (found, out) == (code, ""), err
    assert said in err


def test_what_is_not_there_is_said(source: tuple[str, str], base: str, folder: Path) -> None:
    code, _, err = export("no/such&id", *source, "--jsonl", "-")
    assert code == 1
    assert "no/such&id" in err
    both = ("recorded", "--url", base, "--record", str(folder), "--jsonl", "-")
    assert export(*both)[0] == 2


def test_another_server_is_not_blamed_for_the_request(tmp_path: Path) -> None:
    """vLLM's own port, too, answers that it has no such page."""
    with speaker("other", []) as url:
        other = url.removesuffix("/v1")
        code, _, err = export("recorded", "--url", other, "--jsonl", str(tmp_path / "x"))
    assert code == 1
    assert f"{other} is no neuroscope server's features port" in err


def test_lines_on_a_terminal_are_nothing_that_it_obeys(folder: Path) -> None:
    words = ["export", "recorded", "--record", str(folder), "--jsonl", "-"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "neuroscope_vllm.cli", *words], stdout=theirs, close_fds=True
    ) as child:
        os.close(theirs)
        told = b""
        with contextlib.suppress(OSError):  # its other end is closed
            while got := os.read(ours, 1 << 16):
                told += got
        os.close(ours)
        assert child.wait(20) == 0
    lines = told.decode().removesuffix("\r\n").split("\r\n")
    assert all(line.isprintable() for line in lines)
    texts = {json.loads(line).get("token") for line in lines}
    assert set(HOSTILE) <= texts
