"""vLLM servers that a bench starts for itself, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec

from neuroscope_vllm.cli.bench_shapes import SHAPE_FLAGS, write_shape
from neuroscope_vllm.cli.demo import SERVER_FLAGS, demo_model, with_demo_saes
from neuroscope_vllm.cli.machine import gpus
from neuroscope_vllm.cli.options import settings_from
from neuroscope_vllm.cli.supervise import (
    console,
    end_what_we_start,
    vllm_command,
    vllm_executable,
)
from neuroscope_vllm.core.access import SECRET_VARIABLES
from neuroscope_vllm.core.config import Settings, without_settings

START_TIMEOUT_S = 600
GPU_SHARE = 0.9
"""Of a card's memory, for all servers together; vLLM's own default for one."""
PLUGIN = "neuroscope"


@contextlib.contextmanager
def served(
    model: str | None, shape: str | None, flags: dict[str, Any], vllm_flags: tuple[str, ...]
) -> Iterator[tuple[str, Settings, tuple[str, ...]]]:
    """(model, settings, vLLM's flags) of what is asked for: a model, a shape or else the demo.

    Raises click.ClickException.
    """
    if model is not None and shape is not None:
        raise click.UsageError("--model and --shape exclude each other.")
    with tempfile.TemporaryDirectory(prefix="neuroscope-bench-") as folder:
        if shape is not None:
            with console.status(f"writing {shape} without weights, and a random SAE"):
                written, sae = write_shape(Path(folder), shape)
            model, flags["sae"] = str(written), flags["sae"] or (str(sae),)
            vllm_flags = (*SHAPE_FLAGS, *vllm_flags)
        elif model is None:
            flags = with_demo_saes(flags)
            model, vllm_flags = str(demo_model()), (*SERVER_FLAGS, *vllm_flags)
        settings = settings_from(flags)
        if not settings.configured:
            raise click.UsageError("no SAE was given; name one with --sae.")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        yield model, settings, vllm_flags


@contextlib.contextmanager
def serving(flags: dict[str, Any], vllm_flags: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(URL of the chats, of the features) of the demo, or of what the flags say, until left."""
    with served(None, None, flags, vllm_flags) as (model, settings, words):
        port, features_port = free_port(), free_port()
        settings = msgspec.structs.replace(settings, features_port=features_port)
        end_what_we_start()
        words = vllm_command(model, port, settings, words)
        with server(words, port, without_settings(os.environ)):
            features = f"http://127.0.0.1:{features_port}"
            httpx.get(f"{features}/ready", timeout=10).raise_for_status()
            yield f"http://127.0.0.1:{port}", features


def sharing_gpu(vllm_flags: tuple[str, ...], servers: int) -> tuple[str, ...]:
    """The flags with which so many servers fit on one card together."""
    named = any(flag.replace("_", "-").startswith("--gpu-memory-util") for flag in vllm_flags)
    if named or not gpus():
        return vllm_flags
    return (*vllm_flags, "--gpu-memory-utilization", f"{GPU_SHARE / servers:.2f}")


def without_plugin(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment in which vLLM loads every plugin but ours."""
    given = environ.get("VLLM_PLUGINS")
    points = metadata.entry_points()
    groups = [group for group in points.groups if group.startswith("vllm.")]
    found = [point.name for group in groups for point in points.select(group=group)]
    names = found if given is None else given.split(",")
    others = ",".join(name for name in names if name != PLUGIN)
    return {**without_settings(environ), "VLLM_PLUGINS": others}


@contextlib.contextmanager
def server(words: list[str], port: int, env: dict[str, str]) -> Iterator[None]:
    """A `vllm serve` without keys that answers, until left. Raises click.ClickException with its
    last lines."""
    env = {name: value for name, value in env.items() if name not in SECRET_VARIABLES}
    with tempfile.NamedTemporaryFile("w+b", suffix=".log") as log:
        child = subprocess.Popen(
            [vllm_executable(), *words[1:]],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )
        try:
            _wait_healthy(child, port, Path(log.name))
            yield
        finally:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _wait_healthy(child: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with console.status(f"starting vLLM on port {port}"):
        while time.monotonic() < deadline and child.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise click.ClickException(f"vLLM on port {port} did not start; its last lines:\n{tail}")


def describe(features: str) -> dict[str, Any]:
    """What the side process at this URL says of itself."""
    return httpx.get(f"{features}/v1/features/describe", timeout=10).raise_for_status().json()


def graphs_of(description: dict[str, Any]) -> str:
    """Runner and CUDA-graph mode of the workers, in words."""
    workers = [sender for sender in description["senders"] if sender["role"] == "worker"]
    return ", ".join(sorted({f"{w['runner']}, CUDA graphs {w['cudagraph_mode']}" for w in workers}))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
