"""The heat map as PNG or SVG, with matplotlib."""

from __future__ import annotations

import io
import warnings
from textwrap import fill, shorten
from typing import Any

from neuroscope_vllm.core.patching.heat import ALL, about, column_name, row_name, title
from neuroscope_vllm.core.patching.record import Patching
from neuroscope_vllm.core.pictures import check_pictures

COLOURS = "RdBu_r"
DOTS_PER_INCH = 150
CELL = (0.62, 0.26)
"""Inches."""
MARGIN = (2.6, 3.2)
MAX_INCHES = 200.0
LETTERS = 15
"""Of the heading, an inch."""
MAX_LETTERS = 400
"""Of a prompt in the heading."""


def picture(record: Patching, form: str) -> bytes:
    """The file.

    Args:
        form: `png` or `svg`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_pictures()
    # Not pyplot, which keeps figures and looks for a screen.
    from matplotlib.figure import Figure

    rows, columns = len(record.rows), len(record.columns) + 1
    size = (columns * CELL[0] + MARGIN[0], rows * CELL[1] + MARGIN[1])
    figure = Figure(
        figsize=(min(size[0], MAX_INCHES), min(size[1], MAX_INCHES)), layout="constrained"
    )
    axes: Any = figure.subplots()
    _draw(figure, axes, record)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a script that its font lacks
        figure.savefig(out, format=form, dpi=DOTS_PER_INCH)
    return out.getvalue()


def _draw(figure: Any, axes: Any, record: Patching) -> None:
    from matplotlib.colors import CenteredNorm

    values = [
        [
            float("nan") if value is None else value
            for value in (*row.recovered, row.recovered_of_all)
        ]
        for row in record.rows
    ]
    known = [abs(v - record.untouched) for row in values for v in row if v == v]
    norm = CenteredNorm(vcenter=record.untouched, halfrange=max(1.0, *known))
    axes.set_facecolor("#cccccc")  # seen where nothing was patched
    image = axes.imshow(values, cmap=COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    axes.axvline(len(record.columns) - 0.5, color="black", linewidth=1.5)
    names = [f"{c.position} {column_name(record, c)}" for c in record.columns]
    axes.set_xticks(range(len(names) + 1), [*names, ALL], rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(values)), [row_name(row) for row in record.rows], fontsize=8)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                dark = abs(value - record.untouched) > 0.6 * norm.halfrange
                axes.text(
                    *(x, y, f"{value:z.2f}"),
                    ha="center", va="center", fontsize=7, color="white" if dark else "black",
                )  # fmt: skip
    figure.colorbar(image, ax=axes, label="recovered", shrink=0.8)
    width = int(figure.get_figwidth() * LETTERS)
    lines = [fill(shorten(line, MAX_LETTERS), width) for line in (title(record), *about(record))]
    heading = axes.set_title("\n".join(lines), fontsize=7, loc="left")
    # Dollar signs of a prompt are no formulas.
    for text in (heading, *axes.get_xticklabels()):
        text.set_parse_math(False)
