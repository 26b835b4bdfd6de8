"""The measurement behind `neuroscope bench overhead`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
from rich.progress import Progress
from rich.table import Table

from neuroscope_vllm.cli.supervise import console, end_what_we_start, vllm_command, vllm_executable
from neuroscope_vllm.core.config import Settings, without_settings

START_TIMEOUT_S = 600
PROMPT = "Once upon a time, in a small town by the sea, there lived"


STEERED_VALUE = 1.0
"""Small beside a residual: the work of an edit is the same whatever its size."""


class Steering:
    """Edits for a share of the requests: each adds a little of some feature of a served SAE."""

    def __init__(self, share: float, sites: list[dict[str, Any]]) -> None:
        self._share, self._sites = share, sites
        self._draw = random.Random(0)
        self._sent = 0

    def next(self) -> dict[str, Any]:
        """What the next request bears; evenly spread over the requests."""
        before, self._sent = self._sent, self._sent + 1
        if int(self._sent * self._share) == int(before * self._share):
            return {}
        site = self._draw.choice(self._sites)
        feature = self._draw.randrange(site["sae"]["width"])
        edit = {"op": "add", "layer": site["layer"], "feature": feature, "value": STEERED_VALUE}
        return {"vllm_xargs": {"neuroscope": json.dumps({"steer": [edit]})}}


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """One round against one server."""

    tokens_per_s: float
    itl_ms: float  # median gap between a request's chunks


def compare(
    model: str,
    settings: Settings,
    batches: tuple[int, ...],
    tokens: int,
    rounds: int,
    vllm_flags: tuple[str, ...],
    steered: float = 0.0,
) -> dict[str, Any]:
    """{"rows": [one per batch size], …}. `steered`: share of the observed requests that steer."""
    settings = msgspec.structs.replace(settings, features_port=_free_port())
    features = f"http://127.0.0.1:{settings.features_port}"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    end_what_we_start()
    plain_port, watched_port = _free_port(), _free_port()
    with (
        _server(vllm_command(model, plain_port, None, vllm_flags), plain_port),
        _server(vllm_command(model, watched_port, settings, vllm_flags), watched_port),
    ):
        httpx.get(f"{features}/ready").raise_for_status()
        nothing = Steering(0.0, [])
        steering = Steering(steered, _describe(features)["sites"])
        plain, watched = f"http://127.0.0.1:{plain_port}", f"http://127.0.0.1:{watched_port}"
        of = {plain: nothing, watched: steering}
        with Progress(console=console) as progress:
            task = progress.add_task("measuring", total=len(batches) * rounds)
            rows = []
            for batch in batches:
                for url in (plain, watched):
                    asyncio.run(_load(url, batch, tokens, of[url]))
                before = _worker_counters(features)
                pairs = []
                for i in range(rounds):
                    order = (plain, watched) if i % 2 == 0 else (watched, plain)
                    loads = {url: asyncio.run(_load(url, batch, tokens, of[url])) for url in order}
                    pairs.append((loads[plain], loads[watched]))
                    progress.advance(task)
                rows.append(_row(batch, pairs, before, _worker_counters(features)))
    about = {"tokens": tokens, "rounds": rounds, "model": model, "steered": steered}
    return {"rows": rows, **about}


def _row(
    batch: int,
    pairs: list[tuple[Load, Load]],
    before: dict[str, int],
    after: dict[str, int],
) -> dict[str, Any]:
    spent = {name: after[name] - before.get(name, 0) for name in after}
    steps = max(spent.get("steps", 0), 1)
    return {
        "batch": batch,
        "throughput_ratio": round(
            statistics.median(w.tokens_per_s / p.tokens_per_s for p, w in pairs), 4
        ),
        "itl_ratio": round(statistics.median(w.itl_ms / p.itl_ms for p, w in pairs), 4),
        "plain_tokens_per_s": round(statistics.median(p.tokens_per_s for p, _ in pairs), 1),
        "watched_tokens_per_s": round(statistics.median(w.tokens_per_s for _, w in pairs), 1),
        "plain_itl_ms": round(statistics.median(p.itl_ms for p, _ in pairs), 3),
        "watched_itl_ms": round(statistics.median(w.itl_ms for _, w in pairs), 3),
        "runner_ms_per_step": round(spent.get("submit_us", 0) / steps / 1000, 3),
        "encode_ms_per_step": round(spent.get("encode_us", 0) / steps / 1000, 3),
        "rows_observed": spent.get("rows_observed", 0),
        "rows_dropped": spent.get("rows_dropped", 0),
    }


def table(report: dict[str, Any]) -> None:
    columns = {
        "batch": "batch",
        "throughput_ratio": "throughput ratio",
        "itl_ratio": "latency ratio",
        "plain_tokens_per_s": "tok/s plain",
        "watched_tokens_per_s": "watched",
        "runner_ms_per_step": "runner ms/step",
        "encode_ms_per_step": "encode ms/step",
        "rows_dropped": "rows dropped",
    }
    share = report["steered"]
    grid = Table(
        title="with the plugin over without it, medians of alternated rounds"
        + (f"; {share:.0%} of requests steered" if share else "")
    )
    for heading in columns.values():
        grid.add_column(heading, justify="right")
    for row in report["rows"]:
        grid.add_row(*(str(row[name]) for name in columns))
    console.print(grid)
    console.print(
        "runner: our time on the model's own thread; encode: the encoder's, on a CPU the same time,"
        " on CUDA beside the model. What is left is the side process and the scheduler's tap."
    )


@contextlib.contextmanager
def _server(words: list[str], port: int) -> Iterator[None]:
    with tempfile.NamedTemporaryFile("w+b", suffix=".log") as log:
        child = subprocess.Popen(
            [vllm_executable(), *words[1:]],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=without_settings(os.environ),
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


async def _load(url: str, batch: int, tokens: int, steering: Steering) -> Load:
    limits = httpx.Limits(max_connections=batch)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        began = time.perf_counter()
        streams = (_stream(client, model, tokens, steering.next()) for _ in range(batch))
        gaps = await asyncio.gather(*streams)
        wall = time.perf_counter() - began
    return Load(
        tokens_per_s=batch * tokens / wall,
        itl_ms=1000 * statistics.median(gap for request in gaps for gap in request),
    )


async def _stream(
    client: httpx.AsyncClient, model: str, tokens: int, steer: dict[str, Any]
) -> list[float]:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **steer,
    }
    times = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def _worker_counters(features: str) -> dict[str, int]:
    # Counters travel in the hello once a second.
    time.sleep(2.5)
    senders = _describe(features)["senders"]
    return next(s["counters"] for s in senders if s["role"] == "worker")


def _describe(features: str) -> dict[str, Any]:
    return httpx.get(f"{features}/v1/features/describe", timeout=10).json()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
