"""Start the side process and keep it running. Torch-free; used by every engine's front process.

The front process binds the listening socket itself and hands it down: a taken port is an error
before anything loads, and a side process that was killed comes back on the same socket, so
readers only wait. The side process ends by itself when its parent is gone.
"""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from neuroscope_vllm.core.access import SECRET_VARIABLES, KeyDigests
from neuroscope_vllm.core.config import RUNTIME_VARIABLE, Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.guide import load_guide
from neuroscope_vllm.core.labels import load_labels, stored_labels
from neuroscope_vllm.core.recording.folder import prepare

logger = logging.getLogger(__name__)

RESTART_PAUSE_S = 0.5
MAX_PAUSE_S, WELL_S = 30.0, 60.0
"""One that ends again and again waits ever longer, at most MAX_PAUSE_S; but after it ran for WELL_S
not at all."""
STOP_S = 5.0
"""How long it may take to end: a second for its streams, three to record and export what has
finished."""
OTHER_FILES = 1024
"""Beside those of readers: engines, chats that are passed through, a recording."""
MAX_RUNTIME_BASE = 70
"""A unix socket's path ends at 107 bytes; ours adds about 30."""


class SideConfig(msgspec.Struct, frozen=True):
    """What the side process is told, as JSON in `<directory>/side.json`."""

    settings: Settings
    endpoint: str
    """Where workers connect, ipc://… or tcp://…"""
    model: str
    """Served model name, as in the OpenAI API."""
    tokenizer_file: str | None
    """A `tokenizer.json`; None: tokens are shown by id."""
    upstream: str | None
    """vLLM's base URL; None: no pass-through."""
    labels: dict[int, list[str]] = {}
    """Label files by layer, in order of preference."""
    model_source: str | None = None
    """The model's folder, or its repository on the hub with @revision; None: not known."""
    keys: KeyDigests = KeyDigests()
    parent_pid: int = 0
    listen_fd: int = -1


class SideProcess:
    """The running side process: one per front process, restarted when it dies."""

    def __init__(self, directory: Path, listener: socket.socket) -> None:
        self.directory = directory
        self._listener = listener
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._owner_pid = os.getpid()

    def start(self) -> None:
        self._spawn()
        threading.Thread(target=self._watch, name="neuroscope-side", daemon=True).start()

    def stop(self) -> None:
        """SIGTERM, so that readers get a goodbye; SIGKILL after STOP_S.

        Also removes the runtime directory. Does nothing in a fork of the front process.
        """
        if os.getpid() != self._owner_pid:
            return
        self._stopping.set()
        self._end()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def _spawn(self) -> None:
        withheld = (RUNTIME_VARIABLE, *SECRET_VARIABLES)
        environment = {k: v for k, v in os.environ.items() if k not in withheld}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "neuroscope_vllm.server", str(self.directory / "side.json")],
            pass_fds=[self._listener.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )

    def _watch(self) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            assert self._process is not None
            began = time.monotonic()
            code = self._process.wait()
            if time.monotonic() - began > WELL_S:
                pause = 0.0
            if self._stopping.wait(RESTART_PAUSE_S):
                return
            text = "neuroscope: the side process ended (%s); starting it again in %g s."
            logger.warning(text, code, pause)
            if self._stopping.wait(pause):
                return
            try:
                self._spawn()
            except OSError as error:  # no memory or no files, for now
                logger.warning("neuroscope: the side process can not be started (%s).", error)
            pause = min(2 * pause + 1, MAX_PAUSE_S)


def files_wanted(settings: Settings) -> int:
    """How many files a side process may have open; a reader is one."""
    return settings.max_readers + OTHER_FILES


def check_side(settings: Settings, keys: KeyDigests) -> None:
    """Raise ConfigError if a side process could not serve, guide, record or export as it is to.

    Makes the folder of a recording.
    """
    check_bind(settings, keys)
    load_guide(settings)
    if settings.record is not None:
        prepare(settings.record)
    if settings.otel:
        check_otel(os.environ)


def check_otel(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if events can not be exported over OTLP as these variables say."""
    if not all(map(_installed, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"))):
        raise ConfigError(
            "otel is on, but OpenTelemetry's exporter is not installed; run pip install"
            " 'neuroscope-vllm[otel]', or leave otel out."
        )
    for name in ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := environ.get(name):
            if protocol != "http/protobuf":
                raise ConfigError(
                    f"otel is on and {name} is {protocol}, but events are sent as http/protobuf"
                    " only; set OTEL_EXPORTER_OTLP_LOGS_PROTOCOL to that, and"
                    " OTEL_EXPORTER_OTLP_LOGS_ENDPOINT to your collector's address for it."
                )
            return


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def check_bind(settings: Settings, keys: KeyDigests) -> None:
    """Raise ConfigError if features would be served beyond this machine without a key."""
    host = settings.features_host
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not keys:
        raise ConfigError(
            f"features_host is {host}, which other machines can reach, and features are user text"
            " that no key guards; give vLLM an --api-key (`neuroscope hub` does not see that one:"
            " set VLLM_API_KEY for it) or name an admin_keys_file, or use"
            " 127.0.0.1 and a tunnel (ssh -L)."
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket on host:port. Raises ConfigError, naming the port, if taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"features port {port} on {host} is taken by another process; stop it or choose"
                " another with features_port (--features-port)."
            ) from None
        raise ConfigError(
            f"features host {host} port {port} can not be bound: {error.strerror}."
        ) from None
    except UnicodeError:
        listener.close()
        raise ConfigError(f"features host {host} can not be bound: it is no host's name.") from None
    listener.listen(1024)
    return listener


def label_files(settings: Settings, layers: list[int]) -> dict[int, list[str]]:
    """Label files by layer, those that are shown first first: those given are for the first SAE, in
    their order; else all that are stored for each, by `labels.preference`.

    `layers`: those that `settings.sae` read, in their order. Raises ConfigError on a bad file.
    """
    found = {}
    for number, (layer, source) in enumerate(zip(layers, settings.sae, strict=True)):
        if settings.labels and number == 0:
            for path in settings.labels:
                load_labels(path)
            found[layer] = settings.labels
        else:
            found[layer] = [str(path) for path in stored_labels(source)]
    return found


def url_host(host: str) -> str:
    """`host` as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def runtime_directory() -> Path:
    """A fresh private directory (0700) for the socket and side.json."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    if len(base) > MAX_RUNTIME_BASE:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="neuroscope-", dir=base))


def launch(
    settings: Settings,
    *,
    model: str,
    directory: Path,
    listener: socket.socket,
    tokenizer_file: Path | None,
    upstream: str | None,
    labels: dict[int, list[str]],
    model_source: str | None = None,
    keys: KeyDigests = KeyDigests(),  # noqa: B008, it is frozen
) -> SideProcess:
    """Start the side process for this front process and everything it spawns.

    Raises ConfigError where `check_side` does.
    """
    check_side(settings, keys)
    config = SideConfig(
        settings=settings,
        endpoint=endpoint_of(directory),
        model=model,
        tokenizer_file=str(tokenizer_file) if tokenizer_file else None,
        upstream=upstream,
        labels=labels,
        model_source=model_source,
        keys=keys,
        parent_pid=os.getpid(),
        listen_fd=listener.fileno(),
    )
    (directory / "side.json").write_bytes(msgspec.json.encode(config))
    side = SideProcess(directory, listener)
    side.start()
    os.environ[RUNTIME_VARIABLE] = str(directory)
    return side


def endpoint_of(directory: Path) -> str:
    return f"ipc://{directory}/hub.sock"


def wait_for_socket(directory: Path, timeout: float = 20.0) -> bool:
    """Whether the hub's socket appeared within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (directory / "hub.sock").exists():
            return True
        time.sleep(0.05)
    return False
