"""Key files, and which addresses may do without or must have one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core.config import Settings, resolve
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.keys import (
    Keys,
    check_reachable,
    create_keys,
    hub_endpoint,
    load_keys,
    read_endpoint,
)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_keys(tmp_path / "hub.keys")
    return tmp_path / "hub.keys"


def test_the_command_makes_a_private_file_and_shows_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "hub.keys"
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "keys", str(path)]
    first = subprocess.run(words, capture_output=True, text=True, check=True, umask=0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = load_keys(path)
    assert keys.hub != keys.engine
    assert keys.hub not in first.stdout + repr(keys)
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "exists" in second.stderr
    assert load_keys(path) == keys


def test_every_file_is_another_secret(key_file: Path, tmp_path: Path) -> None:
    create_keys(tmp_path / "other.keys")
    secrets = {*msgspec.structs.astuple(load_keys(key_file))}
    assert not secrets & {*msgspec.structs.astuple(load_keys(tmp_path / "other.keys"))}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_may_open_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:o}.*chmod 600"):
        load_keys(key_file)


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.keys does not exist.*neuroscope keys"):
        load_keys(tmp_path / "none.keys")
    with pytest.raises(ConfigError, match="can not be written"):
        create_keys(tmp_path / "no" / "folder")


@given(st.data())
def test_a_damaged_file_is_refused_without_quoting_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("keys") / "hub.keys"
    create_keys(path)
    content = path.read_bytes().rstrip()
    secret = load_keys(path).hub
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = data.draw(
        st.sampled_from(
            [content[:at], content + content[: at + 1], content[:at] + b'"' + content[at + 1 :]]
        )
        | st.binary(max_size=200)
    )
    if damaged == content:
        return
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="is not one that `neuroscope keys` wrote") as caught:
        load_keys(path)
    assert secret not in str(caught.value)
    assert caught.value.__suppress_context__


def test_keys_must_be_keys() -> None:
    public, _ = zmq.curve_keypair()
    for bad in ("", "short", "x" * 41, "~" * 40):
        with pytest.raises((msgspec.ValidationError, ValueError, zmq.ZMQError)):
            Keys(public.decode(), bad)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"hub": "tcp://10.0.0.1:8082"}, "hub_keys is not given.*neuroscope keys"),
        ({"hub": "tcp://127.0.0.1:8082"}, "hub_keys is not given"),
        ({"hub": "ipc:///run/hub.sock", "hub_keys": "k"}, "keys are for a tcp:// hub"),
        ({"hub_keys": "k"}, "hub is not given"),
        ({"hub": "10.0.0.1:8082", "hub_keys": "k"}, "begins with ipc:// or tcp://"),
        ({"hub": "tcp://10.0.0.1", "hub_keys": "k"}, "write tcp://host:port"),
        ({"hub": "tcp://10.0.0.1:0", "hub_keys": "k"}, "write tcp://host:port"),
        ({"hub": "tcp://10.0.0.1:99999", "hub_keys": "k"}, "write tcp://host:port"),
        ({"hub": "tcp://fe80::1:8082", "hub_keys": "k"}, "write tcp://host:port"),
        ({"hub": "tcp://10.0.0.1:8082#k", "hub_keys": "k"}, "write tcp://host:port"),
    ],
)
def test_a_hub_that_can_not_be(settings: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve(settings, environ={})


@pytest.mark.parametrize("host", ["10.0.0.1", "hub-a.example", "[fe80::1]", "0.0.0.0", "*"])
def test_an_endpoint_carries_the_key_file(key_file: Path, host: str) -> None:
    settings = Settings(hub=f"tcp://{host}:8082", hub_keys=os.path.relpath(key_file))
    endpoint = hub_endpoint(settings)
    assert endpoint == f"tcp://{host}:8082#{key_file}"
    assert read_endpoint(endpoint) == (settings.hub, load_keys(key_file))
    if host in ("0.0.0.0", "*"):
        with pytest.raises(ConfigError, match="none to connect to"):
            check_reachable(settings)
    else:
        check_reachable(settings)


def test_a_home_of_each_hosts_own(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(key_file.parent))
    endpoint = hub_endpoint(Settings(hub="tcp://h:1", hub_keys="~/hub.keys"))
    assert endpoint == "tcp://h:1#~/hub.keys"


def test_a_socket_file_needs_no_keys() -> None:
    settings = Settings(hub="ipc:///run/a#b.sock")
    check_reachable(settings)
    assert hub_endpoint(settings) == settings.hub
    assert read_endpoint("ipc:///run/a#b.sock") == ("ipc:///run/a#b.sock", None)
    assert hub_endpoint(Settings()) is None
