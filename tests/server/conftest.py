"""Fixtures: one side process that most tests share, and ones of a test's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from neuroscope_vllm.core import launch
from neuroscope_vllm.engine.fake import FakeEngine
from tests.server.side import Side, make_tokenizer, start_side
from tests.server.upstream import Upstream


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.server.shutdown()
    upstream.server.server_close()


@pytest.fixture
def new_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Side]]:
    """Starts side processes of a test's own, and stops them."""
    monkeypatch.setenv(launch.RUNTIME_VARIABLE, "")
    sides: list[Side] = []

    def start(**options: Any) -> Side:
        directory = tmp_path / f"side-{len(sides)}"
        directory.mkdir()
        sides.append(start_side(directory, **options))
        return sides[-1]

    yield start
    for side in sides:
        side.process.stop()


LABELS = [
    {"index": 5, "text": "capital cities", "labeller": "test"},
    {"index": 7, "text": "rivers and lakes", "labeller": "test", "score": 0.5},
    {"index": 9, "text": "capital letters", "labeller": "test"},
]


@pytest.fixture(scope="session")
def side(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Iterator[Side]:
    """One side process that most tests share; each uses request ids of its own."""
    directory = tmp_path_factory.mktemp("side")
    labels = directory / "labels.jsonl"
    labels.write_text("".join(json.dumps(label) + "\n" for label in LABELS))
    side = start_side(directory, tokenizer_file=tokenizer_file, labels={20: [str(labels)]})
    yield side
    side.process.stop()


@pytest.fixture(scope="session")
def engine(side: Side) -> Iterator[FakeEngine]:
    with FakeEngine(side.endpoint, layers=(20,), top_k=4) as engine:
        side.wait_armed()
        yield engine
