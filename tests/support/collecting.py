"""`neuroscope collect` on tiny models: its corpus, and how to run it, end it and refuse it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
from click.testing import CliRunner, Result

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.engine.corpus_run import CHUNK, Done
from tests.support import models
from tests.support.served import bin_path, environment

SAMPLES = 6 * CHUNK
MAX_TOKENS = 48
BEFORE, AFTER, TOP, SAMPLE = 6, 3, 20, 60
WANTED = ("--before", BEFORE, "--after", AFTER, "--samples", SAMPLES, "--max-tokens", MAX_TOKENS)
DEADLINE_S = 120
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Tiny layers: threads would wait for each other."""


def write_corpus(path: Path) -> Path:
    """Texts that recur, whole and in part; some begin with a special token, and some characters
    are split over tokens."""
    draw = random.Random(0)
    words = " ".join(models.TRAINING_TEXT).split()
    sentences = [" ".join(draw.choices(words, k=draw.choice([3, 9, 20]))) for _ in range(150)]
    paragraphs = [
        draw.choice(["<bos>", ""]) + " 🦜".join(draw.choices(sentences, k=3))
        for _ in range(SAMPLES)
    ]
    lines = [json.dumps({"text": text}) for text in draw.choices(paragraphs, k=2 * SAMPLES)]
    path.write_text("\n".join(lines))
    return path


def collect(*words: object, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    done = subprocess.run(
        [bin_path("neuroscope"), "collect", *map(str, words)],
        env=environment(env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kill(words: tuple[object, ...], checkpoint: Path, delay: float) -> int:
    """SIGKILL a run `delay` seconds after it wrote a checkpoint; returns the chunks done."""
    head = checkpoint / "run"
    before = head.stat().st_mtime_ns if head.exists() else 0
    process = subprocess.Popen(
        [bin_path("neuroscope"), "collect", *map(str, words)],
        env=environment(ONE_THREAD),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + DEADLINE_S
    while not head.exists() or head.stat().st_mtime_ns == before:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(DEADLINE_S)
    return msgspec.msgpack.decode(head.read_bytes(), type=Done).chunks


def run_here(*words: object) -> Result:
    """In this process, where everything heavy is loaded."""
    return CliRunner().invoke(main, ["collect", *map(str, words)])


def refused(*words: object) -> str:
    done = run_here(*words)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2), done.output
    return " ".join(done.output.split())
