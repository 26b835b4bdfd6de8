"""vLLM whose features go to a hub that runs apart, over TCP with keys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from neuroscope_vllm.core.config import RUNTIME_VARIABLE
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.keys import create_keys, load_keys
from neuroscope_vllm.engine.vllm import plugin
from neuroscope_vllm.engine.vllm.settings import worker_settings
from tests.support.served import SMALL, Served, bin_path, free_port, start, start_vllm

HOST = "127.0.0.2"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_keys(tmp_path / "hub.keys")
    return tmp_path / "hub.keys"


def chat(served: Served, request_id: str) -> str:
    response = httpx.post(
        f"{served.chat}/v1/chat/completions",
        json={
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 16,
            "ignore_eos": True,
        },
        headers={"X-Request-Id": request_id},
        timeout=120,
    )
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]


def check_trace(hub: Served, request_id: str, text: str) -> None:
    (trace,) = hub.trace(f"chatcmpl-{request_id}")
    events = trace["events"]
    assert [e["event"] for e in events].count("gap") == 0
    assert events[-1]["event"] == "done"
    tokens = [e for e in events if e["event"] == "token"]
    assert "".join(e["token"] for e in tokens) == text
    assert [e["token_index"] for e in tokens] == list(range(16))
    assert [e["features_at"] for e in tokens] == ["self"] * 15 + [None]
    assert all(e["top_features"] for e in tokens[:-1])


def test_chats_reach_a_hub_run_apart_also_after_it_was_killed(
    tiny_llama: Path, tiny_sae: Path, tmp_path: Path, key_file: Path
) -> None:
    port = free_port()
    config = {"sae": str(tiny_sae), "hub": f"tcp://{HOST}:{port}", "hub_keys": str(key_file)}
    words = [bin_path("neuroscope"), "hub", str(tiny_llama), "--sae", str(tiny_sae)]
    words += ["--hub", config["hub"], "--hub-keys", str(key_file)]
    features_port = free_port()
    words += ["--features-port", str(features_port)]
    hub = start(words, tmp_path / "hub.log", port, features_port)
    server = start_vllm(
        tiny_llama,
        tmp_path / "serve.log",
        neuroscope=config,
        vllm_flags=(*SMALL, "--enforce-eager"),
    )
    try:
        server.wait_ready(f"{server.chat}/health")
        hub.wait_ready()
        check_trace(hub, "first", chat(server, "first"))
        hub.process.kill()
        hub.process.wait()
        assert isinstance(chat(server, "meanwhile"), str)
        hub = start(words, tmp_path / "hub.log", port, features_port)
        hub.wait_ready(timeout=30)
        check_trace(hub, "second", chat(server, "second"))
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert not [p for p in family if "neuroscope_vllm.server" in p.cmdline()]
        keys = load_keys(key_file)
        seen = server.log.read_text() + hub.log.read_text()
        seen += httpx.get(f"{hub.features}/v1/features/describe").text
        seen += "".join(" ".join([*p.cmdline(), *p.environ().values()]) for p in family)
        assert str(key_file) in seen
        assert keys.hub not in seen
        assert keys.engine not in seen
    finally:
        server.stop()
        hub.stop()


@pytest.fixture
def engine_config(tiny_llama: Path, tiny_sae: Path) -> Iterator[Any]:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()

    def create(neuroscope: dict[str, str], **flags: Any) -> Any:
        additional = {"neuroscope": {"sae": str(tiny_sae), **neuroscope}}
        args = EngineArgs(str(tiny_llama), dtype="float32", additional_config=additional, **flags)
        return args.create_engine_config()

    yield create
    os.environ.pop(RUNTIME_VARIABLE, None)


def test_workers_are_told_the_address_and_the_key_files_path(
    engine_config: Any, key_file: Path
) -> None:
    config = engine_config({"hub": "tcp://10.0.0.1:8082", "hub_keys": str(key_file)})
    settings = worker_settings(config)
    assert settings is not None
    assert settings.endpoint == f"tcp://10.0.0.1:8082#{key_file}"
    assert load_keys(key_file).engine not in str(config.additional_config)


def test_keys_do_not_go_on_to_an_engines_children(
    engine_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NEUROSCOPE_ADMIN_KEYS", "NEUROSCOPE_METRICS_KEYS"):
        monkeypatch.setenv(name, "a-key-of-the-hub-alone")
    engine_config({"hub": "ipc:///nowhere"})
    child = [sys.executable, "-c", "import os; print(os.environ)"]
    inherited = subprocess.run(child, capture_output=True, text=True, check=True).stdout
    assert RUNTIME_VARIABLE in inherited
    assert "a-key-of-the-hub-alone" not in inherited


def test_what_can_not_work_is_refused_before_an_engine_exists(
    engine_config: Any, key_file: Path
) -> None:
    keyed = {"hub_keys": str(key_file)}
    with pytest.raises(ConfigError, match="none to connect to"):
        engine_config({"hub": "tcp://0.0.0.0:8082", **keyed})
    with pytest.raises(ConfigError, match="does not exist on this host"):
        engine_config({"hub": "tcp://10.0.0.1:8082", "hub_keys": f"{key_file}.none"})
    key_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        engine_config({"hub": "tcp://10.0.0.1:8082", **keyed})


def test_an_engine_of_several_hosts_needs_a_hub_that_all_reach(engine_config: Any) -> None:
    two = {"data_parallel_size": 2, "data_parallel_size_local": 1}
    for unreachable in ({}, {"hub": "ipc:///nowhere"}):
        with pytest.raises(ConfigError, match=r"spans several hosts.*neuroscope hub"):
            engine_config(unreachable, **two)
