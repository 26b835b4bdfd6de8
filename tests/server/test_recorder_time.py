"""What the recorder does by the clock: files that are due, days that are over, and its end. In one
process with its hub, where tests can set the clock's limits."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.launch import SideConfig
from neuroscope_vllm.core.recording import folder as folders
from neuroscope_vllm.core.recording.files import Recording
from neuroscope_vllm.engine.fake import Ids, Script, messages
from neuroscope_vllm.server import recorder as recorders
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.recorder import Recorder


def run(hub: Hub, name: str) -> None:
    for message in messages(Ids(f"{name}-internal", name, [1, 2, 3], [4]), Script()):
        hub.handle(message)


@asynccontextmanager
async def recording(folder: Path, **settings: Any):
    config = SideConfig(
        settings=Settings(record=str(folder), **settings),
        endpoint="",
        model="m",
        tokenizer_file=None,
        upstream=None,
        labels={},
    )
    hub = Hub(config.settings, "m")
    recorder = Recorder(hub, config)
    recorder.start()
    try:
        yield hub
    finally:
        await recorder.close()


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


def recorded(folder: Path) -> set[str]:
    return {place.head.request_id for place in Recording(folder).places}


@pytest.mark.parametrize("more", [False, True])
def test_a_request_is_on_disk_when_it_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: bool
) -> None:
    """Also while others keep coming, and no file is full."""
    monkeypatch.setattr(recorders, "FILE_S", 0.4)
    folders.prepare(tmp_path / "kept")

    async def record() -> None:
        async with recording(tmp_path / "kept") as hub:
            began = time.monotonic()
            run(hub, "first")
            for number in range(40 if more else 0):
                run(hub, f"more-{number}")
                await asyncio.sleep(0.02)
            await until(lambda: hub.counters["record_requests"])
            assert time.monotonic() - began > 0.4
            assert "first" in recorded(tmp_path / "kept")
            run(hub, "second")
            await until(lambda: "second" in recorded(tmp_path / "kept"))

    asyncio.run(record())


def test_days_are_forgotten_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to write, too."""
    monkeypatch.setattr(recorders, "TIDY_S", 0.2)
    folder = folders.prepare(tmp_path / "kept")

    async def record() -> None:
        async with recording(folder, record_days=1):
            await asyncio.sleep(0.1)  # it has tidied as it began
            for n in (0, 3):
                day = folder / f"date={datetime.now(UTC).date() - timedelta(days=n)}"
                day.mkdir()
                (day / "0badcafe-000001.parquet").write_bytes(b"old")
            await until(lambda: len(list(folder.iterdir())) == 1)

    asyncio.run(record())


def test_what_a_slow_disk_loses_at_the_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorders, "CLOSE_S", 0.2)
    stuck, writing = threading.Event(), folders.write_private
    monkeypatch.setattr(folders, "write_private", lambda *file: stuck.wait(10) and writing(*file))
    folders.prepare(tmp_path / "kept")

    async def record() -> None:
        async with recording(tmp_path / "kept") as hub:
            run(hub, "late")

    with caplog.at_level(logging.WARNING):
        asyncio.run(record())
    stuck.set()
    assert "was too slow to write what ended last; it is lost" in caplog.text
