"""The measurement behind `neuroscope bench encode`: the served kernel against what the device can.

No way to find a row's best features can do without reading the encoder's weights once, reading the
rows, multiplying them, and reading the weights of the features whose exact values are told. The
floor is the longer of these bytes at the bandwidth of a large copy and these multiplications at
the speed of a large matmul, both measured in the same run: limits by their best repetition, the
encoder by its median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from neuroscope_vllm.cli.bench_memory import random_sae
from neuroscope_vllm.cli.bench_report import Report
from neuroscope_vllm.cli.supervise import console

if TYPE_CHECKING:
    import torch

    from neuroscope_vllm.core.sae.encoder import TopKEncoder

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
SECONDS_PER_CELL = 0.5
MIN_REPEATS = 5


def measure(
    widths: tuple[int, ...], rows: tuple[int, ...], d_model: int, device_name: str
) -> Report:
    """{"cells": [one per width, at least one, and number of rows], "bytes_per_s", …}.

    Raises click.ClickException where there is no such device.
    """
    import torch

    from neuroscope_vllm.core.ranking import make_ranker
    from neuroscope_vllm.core.sae.encoder import TopKEncoder

    device = _device(device_name)
    cells = []
    with torch.inference_mode(), console.status("") as status:
        status.update("a large copy, a large matmul")
        bandwidth = _bandwidth(device)
        dtype = _select_dtype(device)
        flops = _matmul_speed(device, dtype)
        for width in widths:
            ranker = make_ranker("activation", width=width, device=device)
            sae = random_sae(width, d_model, device)
            encoder = TopKEncoder(sae, ranker, select_dtype=dtype)
            for n in rows:
                status.update(f"{n} rows through {width} features")
                x = torch.randn(n, d_model, device=device).to(torch.bfloat16)
                times = _times(lambda x=x, encoder=encoder: encoder.encode(x), device)
                floor = _floor(encoder, n, width, d_model, bandwidth, flops)
                cells.append(_cell(width, n, statistics.median(times), *floor))
    return {
        "cells": cells,
        "d_model": d_model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "select_dtype": str(dtype).removeprefix("torch."),
        "bytes_per_s": round(bandwidth),
        "flops_per_s": round(flops),
    }


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device here; use --device cpu.")
    return torch.device(name)


def _select_dtype(device: torch.device) -> torch.dtype:
    """What the encoder selects in, asked for bfloat16 as where a model runs in it."""
    import torch

    from neuroscope_vllm.core.ranking import make_ranker
    from neuroscope_vllm.core.sae.encoder import TopKEncoder

    ranker = make_ranker("activation", width=8, device=device)
    return TopKEncoder(random_sae(8, 8, device), ranker, select_dtype=torch.bfloat16).select_dtype


def _floor(
    encoder: TopKEncoder, n: int, width: int, d_model: int, bandwidth: float, flops: float
) -> tuple[float, float]:
    """Seconds for the bytes and for the multiplications of n rows."""
    weights = width * d_model * encoder.select_dtype.itemsize
    exact = min(n * encoder.candidates, width) * d_model * 4
    moved = weights + n * d_model * 2 + exact + n * encoder.k * 12
    return moved / bandwidth, 2 * n * d_model * (width + encoder.candidates) / flops


def _cell(width: int, n: int, seconds: float, for_bytes: float, for_flops: float) -> dict[str, Any]:
    floor = max(for_bytes, for_flops)
    return {
        "width": width,
        "rows": n,
        "us": round(1e6 * seconds, 2),
        "bytes_floor_us": round(1e6 * for_bytes, 2),
        "flops_floor_us": round(1e6 * for_flops, 2),
        "bound": "bandwidth" if for_bytes >= for_flops else "arithmetic",
        "over_floor": round(seconds / floor, 3),
    }


def _bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, reading and writing, or of a large sum, whichever is more: a
    CPU's copy also fetches what it is about to overwrite."""
    import torch

    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / min(_times(lambda: target.copy_(source), device))
    return max(copied, size / min(_times(source.sum, device)))


def _matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matmul, two for each multiplication."""
    import torch

    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / min(_times(lambda: torch.mm(a, b, out=out), device))


def _times(run: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of repeated runs, each waited for."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        run()
    wait()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < MIN_REPEATS or time.perf_counter() < began + SECONDS_PER_CELL:
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return times


def table(report: Report) -> None:
    grid = Table(
        title=f"top-k encoder, d_model {report['d_model']}, {report['device']}, selecting in"
        f" {report['select_dtype']}"
    )
    for heading in ("width", "rows", "µs", "floor µs", "bound by", "time / floor"):
        grid.add_column(heading, justify="right")
    for cell in report["cells"]:
        floor = max(cell["bytes_floor_us"], cell["flops_floor_us"])
        shown = (f"{cell['us']:,.0f}", f"{floor:,.0f}", cell["bound"], f"{cell['over_floor']:.2f}")
        grid.add_row(str(cell["width"]), str(cell["rows"]), *shown)
    console.print(grid)
    console.print(
        f"Floor by a large copy or sum ({report['bytes_per_s'] / 1e9:,.1f} GB/s) and a large matmul"
        f" ({report['flops_per_s'] / 1e12:,.2f} TFLOP/s) here and now. Below 1: the weights fit"
        " into a cache."
    )


def draw(report: Report, axes: Any) -> None:
    """Time over floor by rows, a line for each width."""
    for width in dict.fromkeys(cell["width"] for cell in report["cells"]):
        cells = [cell for cell in report["cells"] if cell["width"] == width]
        rows = [cell["rows"] for cell in cells]
        ratios = [cell["over_floor"] for cell in cells]
        axes.plot(rows, ratios, marker="o", label=f"{width} features")
        axes.set_xticks(rows, [str(n) for n in rows])
    axes.axhline(1.0, color="#666666", linewidth=1)
    axes.set(xlabel="rows", ylabel="time / floor", xscale="log", ylim=(0, None))
    axes.legend()
