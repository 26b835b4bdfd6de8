"""`neuroscope doctor` beside servers: side processes with the fake engine, a hub, a real vLLM."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuroscope_vllm.core import launch, wire
from neuroscope_vllm.core.keys import create_keys
from neuroscope_vllm.engine.fake import FakeEngine
from tests.server.side import Side, start_side, wait_until
from tests.server.test_limits import raw_sender
from tests.support.doctor import Report, doctor
from tests.support.served import Served, free_port


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    monkeypatch.setenv(launch.RUNTIME_VARIABLE, "")
    side = start_side(tmp_path)
    yield side
    side.process.stop()


@pytest.fixture
def ask(side: Side) -> Callable[[], Report]:
    return lambda: doctor("--url", side.base, "--features-port", str(side.port))


def test_a_server_that_is_not_armed_then_is(side: Side, ask: Callable[[], Report]) -> None:
    starting = ask()
    assert starting.verdict("server", "armed") == "warning"
    assert starting.verdict("ports", "features_port") == "ok"
    with FakeEngine(side.endpoint, armed=False):
        wait_until(lambda: "not armed" in side.get("/health").text)
        assert ask().verdict("server", "armed") == "failure"
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        engine.run("whole", [1, 2, 3], [4, 5])
        side.wait_done("whole")
        found = ask()
        for name in ("server", "version", "keys", "armed", "senders", "warnings", "losses"):
            assert found.verdict("server", name) == "ok"
        # The fake engine is no OpenAI server, nor has it labels or a calibration.
        for name in ("chat", "labels", "sink_norm"):
            assert found.verdict("server", name) in ("failure", "warning")
        engine.worker.miss()
        wait_until(lambda: "messages_missed" in side.get("/v1/features/describe").text)
        assert "messages_missed 1" in ask().one("server", "losses")["seen"]


def test_a_server_whose_engine_is_silent(side: Side, ask: Callable[[], Report]) -> None:
    code = (
        "import sys, time; from neuroscope_vllm.engine.fake import FakeEngine;"
        " engine = FakeEngine(sys.argv[1]); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, side.endpoint]) as child:
        try:
            side.wait_armed()
            child.send_signal(signal.SIGSTOP)
            wait_until(lambda: "silent" in side.get("/health").text)
            found = ask()
        finally:
            child.kill()
    assert [c["verdict"] for c in found.of("server", "senders")] == ["failure"] * 2
    assert found.verdict("server", "armed") == "failure"


def test_a_worker_on_a_gpu_of_another_host(side: Side, ask: Callable[[], Report]) -> None:
    on_gpu = wire.Hello(
        *("elsewhere", "worker", "gpu", 0, "m"),
        armed=True,
        host="gpu-7",
        device="NVIDIA H200",
        runner="v2",
        cudagraph_mode="NONE",
    )
    with raw_sender(side) as send:
        send(on_gpu)
        wait_until(lambda: side.get("/health").status_code == 200)
        graphs = ask().one("server", "cuda_graphs")
    assert (graphs["verdict"], graphs["subject"]) == ("warning", "elsewhere")
    assert graphs["seen"].startswith("NONE, runner v2 on NVIDIA H200 of gpu-7")


def test_no_server_where_one_was_named() -> None:
    found = doctor("--url", f"http://127.0.0.1:{free_port()}")
    assert found.verdict("server", "server") == "failure"


def test_a_hub_over_tcp(tiny_llama: Path, tmp_path: Path) -> None:
    keys, others = tmp_path / "hub.keys", tmp_path / "others.keys"
    create_keys(keys)
    create_keys(others)
    address, port = f"tcp://127.0.0.1:{free_port()}", free_port()
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "hub", str(tiny_llama), "--hub", address]
    words += ["--hub-keys", str(keys), "--features-port", str(port)]
    assert "nothing answers" in hub_check(address, keys)["seen"]
    with subprocess.Popen(words) as child:
        try:
            deadline = time.monotonic() + 60
            while hub_check(address, keys)["verdict"] != "ok" and time.monotonic() < deadline:
                time.sleep(0.2)
            accepted, refused = hub_check(address, keys), hub_check(address, others)
        finally:
            child.terminate()
    assert accepted["verdict"] == "ok"
    assert (refused["verdict"], "refuses the key" in refused["seen"]) == ("failure", True)


def hub_check(address: str, keys: Path) -> dict[str, Any]:
    return doctor("--hub", address, "--hub-keys", str(keys)).one("server", "hub")


def test_a_real_server(served: Served, tiny_llama: Path, labelled_sae: Path) -> None:
    found = doctor(
        *(str(tiny_llama), "--sae", str(labelled_sae)),
        *("--url", served.features, "--features-port", str(served.features_port)),
        *("--chat-url", served.chat),
    )
    for name in ("armed", "senders", "labels", "sink_norm", "chat", "model_name", "upstream"):
        assert found.verdict("server", name) == "ok"
    assert found.verdict("ports", "features_port") == found.verdict("ports", "chat_port") == "ok"
    # Of a random SAE the self-test thinks little, and says so once.
    assert "explains" in found.one("server", "self_test")["seen"]
    assert found.verdict("server", "warnings") == "ok"
