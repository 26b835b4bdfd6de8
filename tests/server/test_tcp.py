"""A hub run apart, and engines that reach it over TCP with keys."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
import zmq
from tokenizers import Tokenizer

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.keys import create_keys, load_keys
from neuroscope_vllm.engine.fake import FakeEngine, Script
from tests.server.access import ADMIN, METRICS, USER, bearer
from tests.server.side import Side, wait_until
from tests.support.served import free_port

HOST = "127.0.0.2"


class Hub(Side):
    """`neuroscope hub` as a child process; `endpoint` is where and with what engines connect."""

    def __init__(self, folder: Path, address: str, keys: Path | None, log: Path) -> None:
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.stream_url = f"{self.base}/v1/features/stream"
        self.endpoint = address if keys is None else f"{address}#{keys}"
        self.log = log
        words = [sys.executable, "-m", "neuroscope_vllm.cli", "hub", str(folder), "--hub", address]
        words += ["--hub-keys", str(keys)] if keys else []
        self.words = [*words, "--features-port", str(self.port)]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(self.words, stdout=log, stderr=subprocess.STDOUT)
        wait_until(self._listens, 20)

    def _listens(self) -> bool:
        try:
            return "no worker" in self.get("/health").text
        except httpx.TransportError:
            assert self.child.poll() is None, self.log.read_text()
            return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.child.send_signal(number)
        self.child.wait(10)

    def refused(self) -> int:
        return self.counters().get("connections_refused", 0)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_keys(tmp_path / "hub.keys")
    return tmp_path / "hub.keys"


@pytest.fixture
def new_hub(tokenizer_file: Path, tmp_path: Path) -> Iterator[Callable[..., Hub]]:
    hubs: list[Hub] = []

    def start(keys: Path | None, address: str = "") -> Hub:
        address = address or f"tcp://{HOST}:{free_port(HOST)}"
        hubs.append(Hub(tokenizer_file.parent, address, keys, tmp_path / "hub.log"))
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.child.kill()
        hub.child.wait()


@pytest.fixture
def hub(new_hub: Callable[..., Hub], key_file: Path) -> Hub:
    return new_hub(key_file)


def other_keys(right: Path, tmp_path: Path, *, hub: bool, engine: bool) -> Path:
    """A key file whose hub or engine secret is another than in `right`."""
    path = tmp_path / "other.keys"
    create_keys(path)
    mine, right_keys = load_keys(path), load_keys(right)
    chosen = {
        "hub": mine.hub if hub else right_keys.hub,
        "engine": mine.engine if engine else right_keys.engine,
    }
    path.write_bytes(msgspec.json.encode(chosen))
    return path


class Forwarder:
    """A TCP relay that keeps what passes, both ways."""

    def __init__(self, port: int) -> None:
        self.seen = bytearray()
        self._open: list[socket.socket] = []
        self._target = (HOST, port)
        self._server = socket.create_server((HOST, 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._open += near, far
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.seen += data
                sink.sendall(data)
        sink.close()

    def cut(self) -> None:
        """Break the connections there are; new ones may come."""
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self.cut()
        self._server.close()


def test_right_keys_bring_the_whole_stream(hub: Hub, tokenizer: Tokenizer) -> None:
    with FakeEngine(hub.endpoint) as engine:
        hub.wait_armed()
        engine.run("over-tcp", tokenizer.encode("Hi").ids, tokenizer.encode("there").ids)
        (choice,) = hub.wait_done("over-tcp")
    tokens = [e for e in choice["events"] if e["event"] == "token"]
    assert "".join(e["token"] for e in tokens) == "there"
    assert all(e["top_features"] for e in tokens[:-1])
    assert hub.refused() == 0


def test_no_secret_is_shown(hub: Hub, key_file: Path) -> None:
    with FakeEngine(hub.endpoint):
        hub.wait_armed()
        described = hub.get("/v1/features/describe").text
    keys = load_keys(key_file)
    words = Path(f"/proc/{hub.child.pid}/cmdline").read_text()
    environment = Path(f"/proc/{hub.child.pid}/environ").read_text()
    for text in (described, hub.log.read_text(), words, environment):
        assert keys.hub not in text
        assert keys.engine not in text


def test_nobody_on_the_way_can_read_or_find_a_name(hub: Hub) -> None:
    address, _, keys = hub.endpoint.partition("#")
    relay = Forwarder(int(address.rpartition(":")[2]))
    with FakeEngine(f"tcp://{HOST}:{relay.port}#{keys}") as engine:
        hub.wait_armed()
        engine.run("secret-name", list(b"a private question"), list(b"an answer"))
        hub.wait_done("secret-name")
    relay.close()
    assert len(relay.seen) > 5000
    message = wire.encode(wire.Goodbye("secret-name"))
    assert b"secret-name" in message
    for plain in (b"secret-name", b"fake-worker", b"features", b"token_ids", b"jumprelu"):
        assert plain not in relay.seen


@pytest.mark.parametrize(("wrong_hub", "wrong_engine"), [(True, False), (False, True)])
def test_wrong_keys_let_nothing_in_and_are_told_once(
    hub: Hub,
    key_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wrong_hub: bool,
    wrong_engine: bool,
) -> None:
    wrong = other_keys(key_file, tmp_path, hub=wrong_hub, engine=wrong_engine)
    address = hub.endpoint.partition("#")[0]
    with FakeEngine(f"{address}#{wrong}") as engine:
        began = time.monotonic()
        engine.run("refused", list(range(200)), list(range(200)))
        assert time.monotonic() - began < 1
        wait_until(lambda: hub.refused() >= 4)
        wait_until(lambda: engine.scheduler.counters["messages_dropped"] > 200)
        assert engine.scheduler.counters["messages_sent"] == 0
        before = hub.refused()
        time.sleep(3)
        attempts = hub.refused() - before
    # Two senders, a try a second each; ZMQ itself makes a few more before it is told to stop.
    assert 2 <= attempts <= 30
    counters = hub.counters()
    assert "messages" not in counters
    assert hub.get("/v1/requests/refused").status_code == 404
    assert hub.log.read_text().count("refused who connects without our key") == 1
    told = [r.getMessage() for r in caplog.records if "refuses our key" in r.getMessage()]
    assert len(told) == 2, told  # one for each sender
    assert address in told[0]


def test_no_keys_let_nothing_in(hub: Hub) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(hub.endpoint.partition("#")[0])
    dealer.send(wire.encode(wire.Goodbye("x")))
    with socket.create_connection((HOST, int(hub.endpoint.partition("#")[0][-5:]))) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(4096))
    wait_until(lambda: hub.refused() >= 1)
    assert "messages" not in hub.counters()
    dealer.close()
    context.term()
    with FakeEngine(hub.endpoint):
        hub.wait_armed()


def test_an_engine_gets_in_once_its_hub_has_the_right_keys(
    new_hub: Callable[..., Hub], key_file: Path, tmp_path: Path
) -> None:
    """After a refusal ZMQ itself gives up for good."""
    wrong = other_keys(key_file, tmp_path, hub=False, engine=True)
    hub = new_hub(wrong)
    with FakeEngine(hub.endpoint.replace(str(wrong), str(key_file))) as engine:
        wait_until(lambda: hub.refused() >= 2)
        hub.stop()
        wrong.write_bytes(key_file.read_bytes())
        hub.start()
        hub.wait_armed()
        engine.run("at-last", [1, 2], [3])
        hub.wait_done("at-last")


def test_a_killed_hub_comes_back_and_running_requests_go_on(hub: Hub) -> None:
    with FakeEngine(hub.endpoint) as engine:
        hub.wait_armed()
        script = Script(pause_s=0.01)
        running = threading.Thread(
            target=engine.run, args=("first", [1, 2], list(range(300)), script)
        )
        running.start()
        wait_until(lambda: hub.get("/v1/requests/first").status_code == 200)
        hub.stop(signal.SIGKILL)
        hub.start()
        hub.wait_armed()
        running.join()
        engine.run("second", [1, 2], [3])
        hub.wait_done("second")
        dropped = engine.worker.counters["messages_dropped"]
        engine.run("third", [1, 2], [3, 4])
        (third,) = hub.wait_done("third")
        assert engine.worker.counters["messages_dropped"] == dropped
    assert [e["event"] for e in third["events"]].count("token") == 2
    assert hub.refused() == 0


def test_what_a_broken_connection_held_is_told_again(hub: Hub) -> None:
    """ZMQ is back before the next hello, and no message failed to leave: some were on their way."""
    resynced = threading.Event()
    address, _, keys = hub.endpoint.partition("#")
    relay = Forwarder(int(address.rpartition(":")[2]))
    with FakeEngine(f"tcp://{HOST}:{relay.port}#{keys}") as engine:
        engine.scheduler._resync = resynced.set
        hub.wait_armed()
        resynced.clear()
        time.sleep(2)
        assert not resynced.is_set()
        relay.cut()
        assert resynced.wait(5)
        engine.run("after", [1, 2], [3])
        hub.wait_done("after")
    relay.close()


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_taken_address_stops_a_second_hub(
    new_hub: Callable[..., Hub], key_file: Path, tmp_path: Path, scheme: str
) -> None:
    hub = new_hub(key_file) if scheme == "tcp" else new_hub(None, f"ipc://{tmp_path}/hub.sock")
    port = free_port()
    words = [*hub.words[:-1], str(port)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "is taken by another process" in done.stderr
    assert "Traceback" not in done.stderr
    with FakeEngine(hub.endpoint):
        hub.wait_armed()


def test_a_hub_takes_keys_from_its_environment_and_hands_on_none(
    new_hub: Callable[..., Hub], key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"NEUROSCOPE_ADMIN_KEYS": ADMIN, "NEUROSCOPE_METRICS_KEYS": METRICS}
    for name, key in (keys | {"VLLM_API_KEY": USER}).items():
        monkeypatch.setenv(name, key)
    hub = new_hub(key_file)
    with FakeEngine(hub.endpoint):
        hub.wait_armed()
        assert hub.get("/v1/requests").status_code == 401
        assert hub.get("/v1/requests", headers=bearer(ADMIN)).status_code == 200
        assert hub.get("/metrics", headers=bearer(METRICS)).status_code == 200
        # A card of weights that are not there, but the child that looks for them stays a while.
        hub.get("/v1/features/5", headers=bearer(USER))
        (reader,) = psutil.Process(hub.child.pid).children()
        assert "neuroscope_vllm.core.cards" in reader.cmdline()
        assert not {ADMIN, METRICS, USER} & set(reader.environ().values())


def test_an_address_of_another_machine_is_refused(tokenizer_file: Path, key_file: Path) -> None:
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "hub", str(tokenizer_file.parent)]
    words += ["--features-port", "0", "--hub-keys", str(key_file), "--hub"]
    for address in ("tcp://192.0.2.1:8082", "tcp://hub.invalid:8082"):
        done = subprocess.run(
            [*words, address], capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 1
        assert f"{address} is none of this machine's" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_hub_must_be_told_where_to_listen(tokenizer_file: Path) -> None:
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "hub", str(tokenizer_file.parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "no hub was given" in done.stderr


def test_a_hub_that_others_reach_must_have_keys(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "hub", str(tokenizer_file.parent)]
    words += ["--hub", f"ipc://{tmp_path}/hub.sock", "--features-host", "0.0.0.0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "set VLLM_API_KEY for it" in done.stderr


def test_ctrl_c_ends_a_hub_with_a_goodbye(hub: Hub) -> None:
    with hub.open() as events:
        hub.child.send_signal(signal.SIGINT)
        assert [(e["event"], e["reason"]) for e in events] == [("goodbye", "shutdown")]
    assert hub.child.wait(10) == 130
    assert "Traceback" not in hub.log.read_text()
