"""The pictures of `neuroscope bench`, with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from neuroscope_vllm.cli.bench_report import Report
from neuroscope_vllm.cli.machine import in_a_line

DPI = 150


def picture(report: Report, form: str, draw: Callable[[Report, Any], None]) -> bytes:
    """`draw` on axes of its own, with the machine below. `form`: png or svg."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    draw(report, axes)
    axes.grid(alpha=0.3)
    figure.supxlabel(in_a_line(report["machine"]), fontsize=6, color="#666666", parse_math=False)
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "neuroscope"}):
        figure.savefig(out, format=form, dpi=DPI)
    return out.getvalue()
