"""What `record` leaves on disk: all of it, for its owner alone, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from neuroscope_vllm.core import launch
from neuroscope_vllm.core.access import KeyDigests
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.recording.files import Recording, read_traces
from neuroscope_vllm.engine.fake import FakeEngine, Script
from neuroscope_vllm.server.recorder import FILE_BYTES, chosen
from tests.server.side import Side, wait_until

NewSide = Callable[..., Side]
PACED = Script(pause_s=0.005)
"""The wire holds a few hundred messages, and a real engine sends fewer at once."""
SECRET = "my password is hunter2 🦊"


def answers(side: Side, *request_ids: str) -> dict[str, bytes]:
    """/v1/requests/{id} of each, as it came."""
    return {one: side.get(f"/v1/requests/{one}").content for one in request_ids}


def recorded(folder: Path, request_id: str) -> bytes:
    """The same from a recording."""
    return b'{"choices":[%b]}' % b",".join(one.json for one in read_traces(folder, request_id))


def parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("date=*/*.parquet"))


def written(side: Side, count: int) -> None:
    """Once that many requests are on disk."""
    wait_until(lambda: side.counters()["record_requests"] >= count)


def run_big(engine: FakeEngine, name: str) -> None:
    """A request that fills a file by itself."""
    engine.run(name, list(range(97, 107)) * (FILE_BYTES // 5000), [5])


def test_a_recording_is_what_was_told(
    new_side: NewSide, tokenizer_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kept" / "here"
    labels = tmp_path / "labels.jsonl"
    labels.write_text(json.dumps({"index": 5, "text": "capital cities 🦊", "labeller": "t"}) + "\n")
    side = new_side(
        settings={"record": str(folder)},
        tokenizer_file=tokenizer_file,
        labels={20: [str(labels)]},
    )
    before = time.time()
    with FakeEngine(side.endpoint, layers=(5, 20)) as engine:
        side.wait_armed()
        prompt = [byte + 3 for byte in range(60)]
        engine.run("chatcmpl-a", prompt, [70, 71, 72], Script(pause_s=0.1))
        engine.run("chatcmpl-b", prompt, [80] * 30, Script(lost=frozenset({3}), cached=8))
        engine.run("chatcmpl-b", prompt, [81] * 30, Script(choice=1, drafts=2, preempt_at=5))
        engine.run("chatcmpl-c", prompt, [], Script(abort=True))
        side.wait_done("chatcmpl-b", 2)
        told = answers(side, "chatcmpl-a", "b", "chatcmpl-c")
        assert side.counters()["record_requests_dropped"] == 0
        describe = side.get("/v1/features/describe").json()
        assert describe["recording"] == {"rate": 1.0, "days": 0, "redact": "none"}
        assert str(folder) not in json.dumps(describe)
    side.process.stop()
    for request_id, answer in told.items():
        assert recorded(folder, request_id) == answer, request_id
    recording = Recording(folder)
    assert [site.layer for site in recording.about.sites] == [5, 20]
    assert recording.about.model == "fake"
    times = [event.time for event in recording.read(recording.find("a")[0]).events]
    assert all(time is not None for time in times)
    assert times == sorted(times)  # pyright: ignore[reportArgumentType]
    assert before - 1 < times[0] < time.time() + 1  # pyright: ignore[reportOptionalOperand]
    assert 0.25 < times[-1] - times[0] < 5  # pyright: ignore[reportOptionalOperand]
    assert_private(folder)


def assert_private(folder: Path) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert not [path for path in modes if path.is_file() and path.suffix != ".parquet"]


@pytest.mark.parametrize(("memory_mb", "whole"), [(20, True), (15, False)])
def test_more_at_once_than_readers_can_be_told(
    new_side: NewSide, tmp_path: Path, memory_mb: int, whole: bool
) -> None:
    """What is kept of a request is recorded, also where the stream was too fast for any reader."""
    folder = tmp_path / "kept"
    # Rows may come before their request does, and then wait in the part of what runs.
    parts = {"memory_mb": memory_mb, "ring_mb": 1, "prefix_mb": 1, "running_mb": 12}
    side = new_side(settings={"record": str(folder), **parts})
    told: dict[str, bytes] = {}
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        for name, tokens in (("small", 2), ("large", 2500)):
            engine.run(f"chatcmpl-{name}", [7] * tokens, [8] * 3)
            side.wait_done(name)
            told |= answers(side, name)
        assert side.counters()["record_requests_dropped"] == 0
    side.process.stop()
    for name, answer in told.items():
        assert recorded(folder, name) == answer, name
    (choice,) = json.loads(told["large"])["choices"]
    assert choice["events_total"] == 2505
    assert (choice["events_kept"] == 2505) == whole


def test_without_record_nothing_is_kept(side: Side) -> None:
    describe = side.get("/v1/features/describe").json()
    assert describe["recording"] is None
    assert describe["replay"] is False
    assert not any(name.startswith("record") for name in describe["counters"])


def test_text_is_left_out_where_asked(
    new_side: NewSide, tokenizer_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    settings = {"record": str(tmp_path / "kept"), "record_redact": "text"}
    side = new_side(settings=settings, tokenizer_file=tokenizer_file)
    ids = tokenizer.encode(SECRET).ids
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        engine.run("chatcmpl-secret", ids, ids)
        side.wait_done("secret")
        told = json.loads(answers(side, "secret")["secret"])["choices"][0]["events"]
    side.process.stop()
    (file,) = parquet_files(tmp_path / "kept")
    table = pq.read_table(file)
    assert table["token"].null_count == table["token_id"].null_count == len(table)
    assert [
        row for row in table.to_pylist() if row["event"] in ("prompt", "token") and row["json"]
    ] == []
    kept = json.loads(recorded(tmp_path / "kept", "secret"))["choices"][0]["events"]
    assert len(kept) == len(told)
    for one, other in zip(kept, told, strict=True):
        if "token" in other:
            assert (one["token"], one["token_id"]) == ("▮ ", -1)
            other |= {"token": "▮ ", "token_id": -1}
        assert one == other
    for values in table.to_pydict().values():
        assert not any("hunter" in str(value) for value in values)


def test_a_kill_loses_what_was_not_written_and_no_more(new_side: NewSide, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    side = new_side(settings={"record": str(folder)})
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        run_big(engine, "chatcmpl-whole")
        side.wait_done("whole")
        told = answers(side, "whole")["whole"]
        written(side, 1)
        engine.run("chatcmpl-lost", [7] * 20, [8] * 20)
        side.wait_done("lost")
        engine.run("chatcmpl-torn", [7] * 20, [8] * 20, Script(pause_s=0.001))
        run_big(engine, "chatcmpl-torn-too")
        old = side.process.pid
        assert old is not None
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: side.process.pid != old)
        side.wait_armed()
        engine.run("chatcmpl-after", [7] * 20, [8] * 20)
        side.wait_done("after")
    side.process.stop()
    assert recorded(folder, "whole") == told
    found = {place.head.request_id for place in Recording(folder).places}
    assert {"chatcmpl-whole", "chatcmpl-after"} <= found
    assert "chatcmpl-lost" not in found
    for file in parquet_files(folder):
        assert len(pq.read_table(file)) > 0
    list(read_traces(folder))


def test_a_recording_forgets(new_side: NewSide, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    today = datetime.now(UTC).date()
    days = {n: folder / f"date={today - timedelta(days=n)}" for n in (0, 1, 2, 3, 400)}
    for day in days.values():
        day.mkdir(parents=True)
        (day / "0badcafe-000001.parquet").write_bytes(b"old")
    (days[3] / "notes.txt").write_text("not ours")
    (folder / "date=tomorrow").mkdir()
    (folder / "else.parquet").write_bytes(b"not ours")
    half = days[0] / ".0badcafe-000002.parquet.partial"
    fresh = days[0] / ".0badcafe-000003.parquet.partial"
    for path in (half, fresh):
        path.write_bytes(b"half")
    os.utime(half, (time.time() - 3600,) * 2)
    new_side(settings={"record": str(folder), "record_days": 2})
    wait_until(lambda: not half.exists() and not days[400].exists())
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file()}
    assert names == {
        "else.parquet",
        *(f"{days[n].name}/0badcafe-000001.parquet" for n in (0, 1, 2)),
        f"{days[0].name}/.0badcafe-000003.parquet.partial",
        f"{days[3].name}/notes.txt",
    }


def test_a_share_of_requests_is_recorded(new_side: NewSide, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    side = new_side(settings={"record": str(folder), "record_rate": 0.5})
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        internal = [engine.run(f"chatcmpl-{n}", [1, 2], [3], PACED) for n in range(60)]
        wait_until(lambda: side.counters().get("requests_done") == 60)
        wait_until(lambda: side.counters()["record_requests_skipped"] > 15)
    side.process.stop()
    found = {place.head.internal_id for place in Recording(folder).places}
    assert found == {one for one in internal if chosen(one, 0.5)}
    assert 15 < len(found) < 45


def test_sampling_is_by_request() -> None:
    ids = [f"chatcmpl-{n}-{n:08x}" for n in range(4000)]
    assert 0.22 < sum(chosen(one, 0.25) for one in ids) / 4000 < 0.28
    assert all(chosen(one, 1.0) for one in ids)
    assert all(chosen(one, 0.5) for one in ids if chosen(one, 0.25))
    assert all(chosen(one, 0.25) == chosen(f"3_{one}", 0.25) for one in ids)


@pytest.mark.parametrize("how", ["full", "gone"])
def test_a_disk_that_takes_nothing_stops_no_stream(
    new_side: NewSide, tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kept"
    side = new_side(settings={"record": str(folder)})
    assert side.process.pid is not None
    if how == "full":
        resource.prlimit(side.process.pid, resource.RLIMIT_FSIZE, (1000, 1 << 40))
    else:
        folder.rmdir()
        folder.write_text("in the way")
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        for number in range(2):
            run_big(engine, f"chatcmpl-{number}")
            wait_until(lambda n=number: side.counters()["record_requests_failed"] == n + 1)
            assert len(side.read(f"chatcmpl-{number}")) > 1000
        if how == "full":
            resource.prlimit(side.process.pid, resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))
        else:
            folder.unlink()
        run_big(engine, "chatcmpl-2")
        written(side, 1)
        assert side.get("/health").status_code == 200
    side.process.stop()
    assert [place.head.request_id for place in Recording(folder).places] == ["chatcmpl-2"]
    assert not list(folder.rglob("*.partial"))
    said = capfd.readouterr().err
    assert said.count("requests can not be recorded in") == 1
    assert said.count("are recorded in") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("where", ["/proc/kept", "file", "file/kept"])
def test_a_folder_that_can_not_be_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="where no file can be made"):
        launch.check_side(Settings(record=str(tmp_path / where)), KeyDigests())


def test_a_folder_that_one_may_not_write_is_refused(tmp_path: Path) -> None:
    """As somebody who is not root."""
    (tmp_path / "kept").mkdir(mode=0o555)
    code = f"""if True:
        import os
        from neuroscope_vllm.core import access, config, launch
        os.chdir({str(tmp_path)!r})
        os.setuid(65534)
        launch.check_side(config.Settings(record="kept"), access.KeyDigests())
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "record is kept, where no file can be made (Permission denied)" in ran.stderr


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_two_thousand_requests_in_bounded_memory(new_side: NewSide, tmp_path: Path) -> None:
    """With little memory, so that most traces are given up long before the end."""
    folder = tmp_path / "kept"
    side = new_side(settings={"record": str(folder), "memory_mb": 32, "trace_requests": 64})
    assert side.process.pid is not None
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        engine.run("first", [1] * 20, [2] * 10)
        side.wait_done("first")
        before = resident_mb(side.process.pid)
        for n in range(2000):
            engine.run(f"chatcmpl-{n}", [1 + n % 50] * 20, [2] * 10)
            if n % 8 == 7:  # a real engine is slower than the wire
                wait_until(lambda n=n: side.counters()["requests_done"] >= n + 2)
        wait_until(lambda: side.counters()["record_requests"] > 100)
        grown = resident_mb(side.process.pid) - before
        counters = side.counters()
        describe = side.get("/v1/features/describe").json()
    side.process.stop()
    print(f"{grown:.0f} MB more; {describe['limits']}")
    assert grown < 150
    # A real engine does not end 250 requests a second; what the writer had no time for is counted.
    dropped = counters["record_requests_dropped"]
    assert dropped < 200
    assert counters["record_requests_failed"] == 0
    found = [place.head for place in Recording(folder).places]
    assert len(found) == 2001 - dropped
    assert {head.events for head in found} == {32}
    assert 2 < len(parquet_files(folder)) < 40


def test_a_recording_takes_no_readers_place(new_side: NewSide, tmp_path: Path):
    """Or it could not begin where readers are sooner, when a side process is started again."""
    side = new_side(settings={"record": str(tmp_path / "rec"), "max_readers": 1})
    with FakeEngine(side.endpoint) as engine, side.open():
        side.wait_armed()
        assert side.get("/v1/features/stream").status_code == 503
        engine.run("r", [1, 2], [3])
        wait_until(lambda: any(one["finished"] for one in side.get("/v1/requests").json()["data"]))
    side.process.stop()
    assert [trace.head.request_id for trace in read_traces(tmp_path / "rec")] == ["r"]
