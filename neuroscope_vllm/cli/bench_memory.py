"""The measurement behind `neuroscope bench memory`.

Each way runs in a process of its own, so that what one leaves behind is not held against the next.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from neuroscope_vllm.cli.supervise import console

if TYPE_CHECKING:
    from torch import Tensor

    from neuroscope_vllm.core.sae.sae import SAE

WAYS = {
    "top_k": "TopKEncoder (top 8, selected in float32)",
    "sparse": "encode_sparse (all firings)",
    "reconstruction": "Reconstruction (FVU, L0)",
}
L0 = 71  # Gemma Scope's canonical SAE of layer 20


def measure(width: int, rows: int, d_model: int) -> dict[str, Any]:
    """{"device", "width", "rows", "d_model", "weights_mb", "ways": {name: {"ms_per_row",
    "peak_mb"}}}, MiB beyond the SAE's weights and the rows, construction included."""
    report: dict[str, Any] = {"width": width, "rows": rows, "d_model": d_model}
    ways: dict[str, Any] = {}
    with console.status("") as status:
        for way, what in WAYS.items():
            status.update(what)
            words = [sys.executable, "-m", __name__, way, str(width), str(rows), str(d_model)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode != 0:
                raise click.ClickException(
                    f"{what} of {rows} rows x {width} features ended with {done.returncode};"
                    " memory may be short, so try fewer of either."
                )
            ways[way] = json.loads(done.stdout)
            report |= {name: ways[way].pop(name) for name in ("device", "weights_mb")}
    return report | {"ways": ways}


def table(report: dict[str, Any]) -> None:
    shown = Table(
        title=f"{report['rows']} rows of {report['d_model']} x {report['width']} features"
        f" ({report['weights_mb']:,.0f} MiB of weights), {report['device']}"
    )
    shown.add_column("")
    shown.add_column("ms a row", justify="right")
    shown.add_column("peak beyond the weights, MiB", justify="right")
    for way, figures in report["ways"].items():
        shown.add_row(WAYS[way], f"{figures['ms_per_row']:.3f}", f"{figures['peak_mb']:,.0f}")
    console.print(shown)


def _run(way: str, width: int, rows: int, d_model: int) -> dict[str, Any]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        sae = random_sae(width, d_model, device)
        x = torch.randn(rows, d_model, device=device)
        peak = _peak_meter(device)
        encode = _way(way, sae)
        began = time.perf_counter()
        encode(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "weights_mb": round(2 * width * d_model * 4 / 2**20, 1),
        "ms_per_row": round(1e3 * seconds / rows, 4),
        "peak_mb": round(peak() / 2**20, 1),
    }


def _way(way: str, sae: SAE) -> Callable[[Tensor], object]:
    from neuroscope_vllm.core.ranking import make_ranker
    from neuroscope_vllm.core.sae.encoder import TopKEncoder
    from neuroscope_vllm.core.sae.sparse import Reconstruction, encode_sparse

    if way == "sparse":
        return lambda x: encode_sparse(sae, x)
    if way == "reconstruction":
        return lambda x: Reconstruction.empty(sae.d_model).update(sae, x)
    ranker = make_ranker("activation", width=sae.width, device=sae.b_enc.device)
    return TopKEncoder(sae, ranker).encode


def random_sae(width: int, d_model: int, device: Any) -> SAE:
    """Features of random directions, L0 of them active on a normally distributed row."""
    import torch

    from neuroscope_vllm.core.sae.info import SAEInfo
    from neuroscope_vllm.core.sae.sae import SAE

    rows, decoder = (torch.empty(width, d_model, device=device) for _ in range(2))
    rows.uniform_(-1, 1).mul_((3 / d_model) ** 0.5)
    zeros = torch.zeros(width, device=device)
    active = torch.tensor(min(L0 / width, 0.25))
    info = SAEInfo(
        source="random", format="", architecture="jumprelu", d_model=d_model, width=width
    )
    threshold = zeros - float(torch.special.ndtri(active))
    return SAE(rows.t(), zeros, threshold, decoder.copy_(rows), zeros[:1].expand(d_model), info)


def _peak_meter(device: Any) -> Callable[[], int]:
    """A function that tells the most bytes that were held at once, beyond what is held now."""
    import torch

    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() - held
    held = _resident("VmRSS")
    return lambda: _resident("VmHWM") - held


def _resident(which: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, which tells the peak alone
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    way, *sizes = sys.argv[1:]
    click.echo(json.dumps(_run(way, *map(int, sizes))))
