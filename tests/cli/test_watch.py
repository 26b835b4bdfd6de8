"""`neuroscope watch` against real side processes: in a terminal, in a pipe, through a restart."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.engine.fake import FakeEngine, Script, features_of
from tests.server.conftest import engine, new_side, side, tokenizer, tokenizer_file
from tests.server.side import Side, make_tokenizer, wait_until

__all__ = ["engine", "new_side", "side", "tokenizer", "tokenizer_file"]

ANSWER = "rivers to 🌊"
PROMPT, OUTPUT = (make_tokenizer().encode(text).ids for text in ("what runs?", ANSWER))
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\r" * 2
CODES = re.compile(r"\x1b\[[0-9;]*m")


class Watch:
    """A running `neuroscope watch`; `out` is what it has written."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process, self._fd = process, fd
        self._bytes = b""

    @property
    def out(self) -> str:
        with contextlib.suppress(OSError):  # Linux: the other end of a terminal is gone
            while select.select([self._fd], [], [], 0)[0] and (got := os.read(self._fd, 1 << 16)):
                self._bytes += got
        return self._bytes.decode(errors="replace").replace("\r\n", "\n")

    def wait_for(self, text: str) -> str:
        wait_until(lambda: text in self.out)
        return self.out

    def end(self, sent: signal.Signals | None = None) -> int:
        if sent is not None:
            self.process.send_signal(sent)
        deadline = time.monotonic() + 20
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.out
            _ = self.out  # so that it can go on writing
            time.sleep(0.02)
        return self.process.returncode


@contextlib.contextmanager
def watching(side: Side, *words: str, columns: int | None = 80, **env: str) -> Iterator[Watch]:
    """In a terminal of that many columns; None: in a pipe. Until the hub has its reader."""
    wait_until(lambda: _readers(side) == 0)
    if columns is None:
        ours, theirs = os.pipe()
    else:
        ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-m", "neuroscope_vllm.cli", "watch", "--url", side.base, *words],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**clean, "TERM": "xterm-256color", **env},
        # Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    watch = Watch(process, ours)
    try:
        wait_until(lambda: _readers(side) == 1 or process.poll() is not None)
        yield watch
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _readers(side: Side) -> int:
    return side.get("/v1/features/describe").json()["limits"]["readers"]


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["watch", *words])
    return done.exit_code, done.stdout, done.stderr


def test_a_terminal_of_80_columns(side: Side, engine: FakeEngine):
    with watching(side) as watch:
        engine.run("in-a-terminal", PROMPT, OUTPUT, Script(pause_s=0.005))
        out = watch.wait_for("done (length)")
        assert watch.end(signal.SIGINT) == 130
        assert "Traceback" not in watch.out
        assert "Aborted" not in watch.out
    assert "\x1b[1;33m" in out  # coloured
    assert not re.sub(CODES, "", out).count("\x1b")  # no cursor is moved, no screen switched
    lines = re.sub(CODES, "", out).splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert any("in-a-terminal, 10 prompt tokens" in line for line in lines)
    assert any("what runs?" in line for line in lines)
    [line] = [line for line in lines if "'v'" in line]
    index, activation = features_of(OUTPUT[2], 12, 20, 4)[0]
    assert f"{activation:.3g} [{index}]" in line
    assert "'🌊'" in re.sub(CODES, "", out)


def test_json_on_a_terminal_is_nothing_that_it_obeys(side: Side, engine: FakeEngine):
    """JSON escapes neither what turns text round nor the control characters above ASCII."""
    evil = "\x9b31m\x7f\u202e\u2028🌊"
    with watching(side, "--request", "json-in-a-terminal", "--json") as watch:
        engine.run("json-in-a-terminal", PROMPT, make_tokenizer().encode(evil).ids)
        assert watch.end() == 0
        lines = watch.out.strip().split("\n")
    assert all(line.isprintable() for line in lines)
    told = [json.loads(line) for line in lines]
    assert "".join(one["token"] for one in told if one["event"] == "token") == evil


def test_an_output_that_has_not_every_character(side: Side, engine: FakeEngine):
    words = ("--request", "in-ascii")
    with watching(side, *words, columns=None, PYTHONIOENCODING="ascii") as watch:
        engine.run("in-ascii", PROMPT, OUTPUT)
        assert watch.end() == 0
        assert "done (length)" in watch.out


def test_an_id_that_is_no_text_is_refused(side: Side, engine: FakeEngine):
    code, out, err = run("--url", side.base, "--request", "\udcff")
    assert (code, out) == (1, "")
    assert "no utf-8" in err


def test_no_color(side: Side, engine: FakeEngine):
    with watching(side, "--request", "uncoloured", NO_COLOR="1") as watch:
        engine.run("uncoloured", PROMPT, OUTPUT)
        assert watch.end() == 0
        assert "[33" not in watch.out
        assert ";33" not in watch.out


def test_a_narrow_terminal_and_all_features(side: Side, engine: FakeEngine):
    with watching(side, "--request", "narrow", "--top-k", "4", columns=40) as watch:
        engine.run("narrow", PROMPT, OUTPUT)
        assert watch.end() == 0
        out = re.sub(CODES, "", watch.out)
    assert max(map(cell_len, out.splitlines())) <= 40
    for index, _ in features_of(OUTPUT[2], 12, 20, 4):
        assert f"[{index}]" in out


def test_one_request_ends_by_itself(side: Side, engine: FakeEngine):
    engine.run("alone", PROMPT, OUTPUT)
    engine.run("other", PROMPT, OUTPUT)
    side.wait_done("other")
    code, out, err = run("--url", side.base, "--request", "alone")
    assert (code, err) == (0, "")
    assert "other" not in out
    assert out.count("rivers") == 0  # a line a token
    assert len([line for line in out.splitlines() if line.startswith("'")]) == len(ANSWER)


def test_text_sends_nothing_to_the_terminal(side: Side, engine: FakeEngine):
    evil = make_tokenizer().encode(EVIL).ids
    engine.run("evil", evil, evil)
    side.wait_done("evil")
    hit = features_of(evil[-2], 2 * len(evil) - 2, 20, 4)[0][0]
    for words in (["--request", "evil"], ["--request", "evil", "--feature", str(hit)]):
        with watching(side, *words) as watch:
            assert watch.end() == 0
            out = re.sub(CODES, "", watch.out)
        assert out.isprintable() or set(filter(lambda c: not c.isprintable(), out)) == {"\n"}
        assert "\\x1b" in out
        assert "\\u202e" in out


def test_json_is_the_stream(side: Side, engine: FakeEngine):
    engine.run("as-json", PROMPT, OUTPUT)
    side.wait_done("as-json")
    code, out, _ = run("--url", side.base, "--request", "as-json", "--json")
    assert code == 0
    said = [json.loads(line) for line in out.splitlines()]
    headers = {"Accept": "application/x-ndjson"}
    told = side.get("/v1/features/stream?request_id=as-json", headers=headers).text
    there = [json.loads(line) for line in told.splitlines()]
    for event in there:
        del event["id"]
    assert said == there


def test_a_pipe_gets_lines_at_once_and_may_close(side: Side, engine: FakeEngine):
    with watching(side, "--json", columns=None) as watch:
        engine.run("piped", PROMPT, OUTPUT)
        out = watch.wait_for('"event":"done"')
        assert all(json.loads(line) for line in out.splitlines())
    line = f"{sys.executable} -m neuroscope_vllm.cli watch --request piped --url {side.base}"
    done = subprocess.run(
        ["bash", "-c", f"{line} | head -1"], capture_output=True, text=True, timeout=30, check=True
    )
    assert "piped" in done.stdout
    assert "Traceback" not in done.stderr


def test_one_feature_over_all_requests(side: Side, engine: FakeEngine):
    token, position = OUTPUT[2], len(PROMPT) + 2
    index, activation = features_of(token, position, 20, 4)[0]
    with watching(side, "--feature", str(index)) as watch:
        for name in ("feature-a", "feature-b"):
            engine.run(name, PROMPT, OUTPUT)
        out = re.sub(CODES, "", watch.wait_for("feature-b"))
        wait_until(lambda: len(re.findall(f"{activation:.3g} ", watch.out)) >= 2)
        assert watch.end(signal.SIGINT) == 130
        out = re.sub(CODES, "", watch.out)
    lines = out.splitlines()
    assert lines[0] == f"feature {index} of layer 20, unlabelled"
    hits = [line for line in lines if line.startswith("#") and "riv" in line]
    assert len(hits) == 2
    assert all(line.endswith("what runs?riv") for line in hits)
    assert max(map(cell_len, lines)) <= 80
    code, json_out, _ = run(
        "--url", side.base, "--feature", f"20:{index}", "--request", "feature-a", "--json"
    )
    found = [json.loads(line) for line in json_out.splitlines()]
    assert code == 0
    assert (position, token) in [(one["position"], one["token_id"]) for one in found]
    assert all(index in [f["index"] for f in one["top_features"]] for one in found)


def test_the_label_of_a_followed_feature(side: Side, engine: FakeEngine):
    engine.run("labelled", PROMPT, OUTPUT)
    side.wait_done("labelled")
    _, out, _ = run("--url", side.base, "--feature", "5", "--request", "labelled")
    assert out.splitlines()[0] == "feature 5 of layer 20: capital cities"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--feature", "20:99999"], 1, "layer 20 has features 0 to 16383, and 99999 was asked for"),
        (["--feature", "3:5"], 1, "layer 3 is not observed here; 20 is"),
        (["--feature", "5", "--top-k", "2"], 2, "--top-k would hide tokens"),
        (["--feature", "20:5", "--layer", "21"], 2, "--feature names layer 20, and --layer 21"),
        (["--feature", "five"], 2, "'five' is no feature; give [LAYER:]INDEX"),
        (["--layer", "7"], 1, "layer 7 is not observed here; 20 is"),
        (["--top-k", "99"], 1, "top_k is 99 but this server reports"),
    ],
)
def test_what_can_not_be_is_one_sentence(
    side: Side, engine: FakeEngine, words: list[str], code: int, sentence: str
):
    got, out, err = run("--url", side.base, *words)
    assert (got, out) == (code, "")
    assert sentence in err
    assert "Traceback" not in err


def test_nobody_there_is_one_sentence():
    code, out, err = run("--url", "http://127.0.0.1:9")
    assert (code, out) == (1, "")
    assert err.startswith("Error: no feature stream answers at http://127.0.0.1:9")
    assert len(err.splitlines()) == 1


def test_layers_are_told_apart(new_side: Callable[..., Side], tokenizer_file: Path):
    side = new_side(tokenizer_file=tokenizer_file)
    with FakeEngine(side.endpoint, layers=(3, 20), top_k=4) as engine:
        side.wait_armed()
        engine.run("layered", PROMPT, OUTPUT)
        side.wait_done("layered")
        _, out, _ = run("--url", side.base, "--request", "layered")
        assert out.count("L3 ") == out.count("L20 ") == len(OUTPUT)
        _, out, _ = run("--url", side.base, "--request", "layered", "--layer", "3")
        assert "L20 " not in out
        code, _, err = run("--url", side.base, "--feature", "5")
        assert code == 2
        assert "here are layers 3, 20; give LAYER:INDEX" in err


def test_it_waits_for_a_server_that_comes_back(new_side: Callable[..., Side]):
    side = new_side()
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        with watching(side) as watch:
            engine.run("before", [1, 2], [3, 4])
            watch.wait_for("done (length)")
            old = side.process.pid
            assert old is not None
            os.kill(old, signal.SIGKILL)
            watch.wait_for("broke off")
            wait_until(lambda: side.process.pid != old)
            side.wait_armed()
            watch.wait_for("again")
            engine.run("after", [1, 2], [3, 4])
            out = watch.wait_for("after")
            assert "gap: the side process was started again" in re.sub(CODES, "", out)
            assert watch.end(signal.SIGINT) == 130
