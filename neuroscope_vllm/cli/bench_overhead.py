"""The measurement behind `neuroscope bench overhead`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import statistics
import time
from collections import deque
from typing import Any

import httpx
import msgspec
from rich.progress import Progress
from rich.table import Table

from neuroscope_vllm.cli.bench_servers import (
    describe,
    free_port,
    graphs_of,
    server,
    sharing_gpu,
    without_plugin,
)
from neuroscope_vllm.cli.machine import machine
from neuroscope_vllm.cli.supervise import console, end_what_we_start, vllm_command
from neuroscope_vllm.core.config import Settings, without_settings

PROMPT = "Once upon a time, in a small town by the sea, there lived"
PLAIN, IDLE, OBSERVED = "plain", "idle", "observed"
"""Arms: vLLM without our plugin; with it but not configured; with every token observed."""
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
    idle: bool = False,
) -> dict[str, Any]:
    """{"rows": [one per batch size], …}.

    Args:
        steered: Share of the observed requests that steer.
        idle: Measure a third server too, whose plugin is installed and not configured.
    """
    settings = msgspec.structs.replace(settings, features_port=free_port())
    features = f"http://127.0.0.1:{settings.features_port}"
    end_what_we_start()
    with contextlib.ExitStack() as running:
        urls = _start(model, settings, vllm_flags, idle, running)
        httpx.get(f"{features}/ready").raise_for_status()
        described = describe(features)
        steering = dict.fromkeys(urls, Steering(0.0, []))
        steering[OBSERVED] = Steering(steered, described["sites"])

        def load(arm: str, batch: int) -> Load:
            return asyncio.run(_load(urls[arm], batch, tokens, steering[arm]))

        rows = []
        with Progress(console=console) as progress:
            task = progress.add_task("measuring", total=len(batches) * rounds)
            for batch in batches:
                for arm in urls:
                    load(arm, batch)
                before = _worker_counters(features)
                done: list[dict[str, Load]] = []
                for i in range(rounds):
                    order = deque(urls)
                    order.rotate(i)
                    done.append({arm: load(arm, batch) for arm in order})
                    progress.advance(task)
                rows.append(_row(batch, done, before, _worker_counters(features)))
    return {
        "rows": rows,
        "tokens": tokens,
        "rounds": rounds,
        "model": model,
        "steered": steered,
        "runner": graphs_of(described),
        "machine": machine(),
    }


def _start(
    model: str,
    settings: Settings,
    vllm_flags: tuple[str, ...],
    idle: bool,
    running: contextlib.ExitStack,
) -> dict[str, str]:
    """Start a server for each arm; returns their URLs."""
    unset, bare = without_settings(os.environ), without_plugin(os.environ)
    arms: dict[str, tuple[Settings | None, dict[str, str]]] = {PLAIN: (None, bare)}
    if idle:
        arms[IDLE] = (None, unset)
    arms[OBSERVED] = (settings, unset)
    flags = sharing_gpu(vllm_flags, len(arms))
    urls = {}
    for arm, (configured, env) in arms.items():
        port = free_port()
        running.enter_context(server(vllm_command(model, port, configured, flags), port, env))
        urls[arm] = f"http://127.0.0.1:{port}"
    return urls


def _row(
    batch: int,
    rounds: list[dict[str, Load]],
    before: dict[str, int],
    after: dict[str, int],
) -> dict[str, Any]:
    spent = {name: after[name] - before.get(name, 0) for name in after}
    steps = max(spent.get("steps", 0), 1)
    row: dict[str, Any] = {"batch": batch}
    for arm in rounds[0]:
        loads = [loads[arm] for loads in rounds]
        row[f"{arm}_tokens_per_s"] = round(statistics.median(x.tokens_per_s for x in loads), 1)
        row[f"{arm}_itl_ms"] = round(statistics.median(x.itl_ms for x in loads), 3)
        if arm != PLAIN:
            row |= _ratios(arm, loads, [loads[PLAIN] for loads in rounds])
    return row | {
        "runner_ms_per_step": round(spent.get("submit_us", 0) / steps / 1000, 3),
        "encode_ms_per_step": round(spent.get("encode_us", 0) / steps / 1000, 3),
        "rows_observed": spent.get("rows_observed", 0),
        "rows_dropped": spent.get("rows_dropped", 0),
    }


def _ratios(arm: str, loads: list[Load], plain: list[Load]) -> dict[str, Any]:
    """Medians over the rounds, and the quartiles between which half of the rounds lie."""
    throughput = [ours.tokens_per_s / p.tokens_per_s for ours, p in zip(loads, plain, strict=True)]
    latency = [ours.itl_ms / p.itl_ms for ours, p in zip(loads, plain, strict=True)]
    of: dict[str, Any] = {}
    for name, ratios in (("throughput", throughput), ("itl", latency)):
        low, middle, high = _quartiles(ratios)
        of[f"{arm}_{name}_ratio"] = round(middle, 4)
        of[f"{arm}_{name}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    return of


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def table(report: dict[str, Any]) -> None:
    share, rows = report["steered"], report["rows"]
    arms = [arm for arm in (IDLE, OBSERVED) if f"{arm}_tokens_per_s" in rows[0]]
    title = "over vLLM without the plugin, medians of alternated rounds"
    ratios = Table(title=title + (f"; {share:.0%} of requests steered" if share else ""))
    for heading in ("batch", "", "throughput", "half lie in", "latency", "half lie in", "tok/s"):
        ratios.add_column(heading, justify="right")
    for row in rows:
        ratios.add_row(str(row["batch"]), PLAIN, "", "", "", "", str(row[f"{PLAIN}_tokens_per_s"]))
        for arm in arms:
            shown = [*_shown(row, f"{arm}_throughput_ratio"), *_shown(row, f"{arm}_itl_ratio")]
            ratios.add_row("", arm, *shown, str(row[f"{arm}_tokens_per_s"]))
    console.print(ratios)
    for row in rows:
        console.print(
            f"batch {row['batch']}: {row['runner_ms_per_step']} ms a step of ours on the model's"
            f" own thread, {row['encode_ms_per_step']} ms of the encoder;"
            f" {row['rows_dropped']} rows dropped"
        )
    console.print(
        f"{report['runner']}. On a CPU the encoder runs on the model's thread, on CUDA beside it."
        " What is left is the side process and the scheduler's tap."
    )


def _shown(row: dict[str, Any], name: str) -> tuple[str, str]:
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.3f}", f"{low:.3f}-{high:.3f}"


def draw(report: dict[str, Any], axes: Any) -> None:
    """Throughput ratios by batch size, with the quartiles of the rounds."""
    rows = report["rows"]
    batches = [row["batch"] for row in rows]
    for arm in (IDLE, OBSERVED):
        name = f"{arm}_throughput_ratio"
        if name not in rows[0]:
            continue
        ratios = [row[name] for row in rows]
        ends = [row[f"{name}_quartiles"] for row in rows]
        below = [ratio - low for ratio, (low, _) in zip(ratios, ends, strict=True)]
        above = [high - ratio for ratio, (_, high) in zip(ratios, ends, strict=True)]
        axes.errorbar(batches, ratios, yerr=[below, above], marker="o", capsize=3, label=arm)
    axes.axhline(1.0, color="#666666", linewidth=1)
    axes.set(xlabel="concurrent requests", ylabel="decode throughput, with / without", xscale="log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.legend()


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
    return next(s["counters"] for s in describe(features)["senders"] if s["role"] == "worker")
