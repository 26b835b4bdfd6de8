"""A real server as a child process: `vllm serve` or `neuroscope serve`, with both ports."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from neuroscope_vllm.core.config import without_settings

TRITON_CPU = Path(__file__).parent / "triton_cpu"
NO_VLLM = {"PYTHONPATH": str(Path(__file__).parent / "no_vllm")}
V2_ON_CPU = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": str(TRITON_CPU),
}
SMALL = ("--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "tiny")
START_TIMEOUT_S = 400


def bin_path(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The caller's environment without any setting of ours, sized for a small machine."""
    clean = without_settings(os.environ)
    return {**clean, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **(extra or {})}


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    log: Path
    port: int
    features_port: int
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def chat(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def features(self) -> str:
        return f"http://127.0.0.1:{self.features_port}"

    def wait_ready(self, url: str | None = None, timeout: float = START_TIMEOUT_S) -> Served:
        url = url or f"{self.features}/ready"
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(url, timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"not ready: {url}\n{self.tail()}")

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def trace(self, request_id: str, choices: int = 1, timeout: float = 20) -> list[dict[str, Any]]:
        """The choices of a request once all are finished, as /v1/requests/{id} gives them."""
        deadline = time.monotonic() + timeout
        answer: Any = None
        while time.monotonic() < deadline:
            url = f"{self.features}/v1/requests/{request_id}"
            response = httpx.get(url, headers=self.headers, timeout=10)
            answer = response.json()
            if response.status_code == 200:
                found = answer["choices"]
                if len(found) == choices and all(choice["finished"] for choice in found):
                    return found
            time.sleep(0.1)
        raise AssertionError(f"no finished trace of {request_id}: {json.dumps(answer)[:800]}")


def start(
    words: list[str],
    log: Path,
    port: int,
    features_port: int,
    env: dict[str, str] | None = None,
) -> Served:
    with log.open("wb") as out:
        process = subprocess.Popen(
            words,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(env),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    return Served(process, log, port, features_port)


def start_neuroscope(
    model: Path,
    sae: Path,
    log: Path,
    *,
    flags: tuple[str, ...] = (),
    vllm_flags: tuple[str, ...] = SMALL,
    env: dict[str, str] | None = None,
) -> Served:
    port, features_port = free_port(), free_port()
    words = [bin_path("neuroscope"), "serve", str(model), "--sae", str(sae)]
    words += ["--port", str(port), "--features-port", str(features_port), *flags]
    return start([*words, "--", *vllm_flags], log, port, features_port, env)


def start_transformers(
    model: Path,
    sae: Path,
    log: Path,
    *,
    flags: tuple[str, ...] = (),
    server_flags: tuple[str, ...] = ("--max-model-len", "1024", "--served-model-name", "tiny"),
    env: dict[str, str] | None = None,
) -> Served:
    return start_neuroscope(
        model,
        sae,
        log,
        flags=("--backend", "transformers", "--device", "cpu", "--dtype", "float32", *flags),
        vllm_flags=server_flags,
        env=env,
    )


def start_vllm(
    model: Path,
    log: Path,
    *,
    neuroscope: dict[str, Any] | None = None,
    vllm_flags: tuple[str, ...] = SMALL,
    env: dict[str, str] | None = None,
) -> Served:
    """The literal `vllm serve`, configured (or not) through --additional-config."""
    port, features_port = free_port(), free_port()
    words = [bin_path("vllm"), "serve", str(model), "--port", str(port), *vllm_flags]
    if neuroscope is not None:
        config = {"neuroscope": {"features_port": features_port, **neuroscope}}
        words += ["--additional-config", json.dumps(config)]
    return start(words, log, port, features_port, env)


def lines(response: httpx.Response) -> Iterator[str]:
    """Of an open response. httpx's own end at all that Unicode calls a line, such as U+2028, which
    random text holds too."""
    rest = ""
    for piece in response.iter_text():
        *whole, rest = (rest + piece).split("\n")
        yield from (line.removesuffix("\r") for line in whole)
    if rest:
        yield rest


def sse_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Parsed events of an open SSE response: {"event", "id", **data}."""
    fields: dict[str, str] = {}
    for line in lines(response):
        if line == "":
            if "data" in fields:
                yield {
                    "event": fields.get("event"),
                    "id": fields.get("id"),
                    **json.loads(fields["data"]),
                }
            fields = {}
        elif match := re.match(r"(event|id|data): ?(.*)", line):
            fields[match[1]] = match[2]
