"""A trace as a PNG or SVG, with matplotlib."""

from __future__ import annotations

import io
import warnings

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from neuroscope_vllm.core.causal.graph import Graph, Node
from neuroscope_vllm.core.causal.layout import lay_out
from neuroscope_vllm.core.labels import clean_label

MORE, LESS, INK, DIM = "#1766c0", "#b3401a", "#222222", "#666666"
CHARS, ROW_INCHES, DPI = 46, 0.24, 150
LEFT, RIGHT = 0.37, 0.63


def picture(graph: Graph, kind: str) -> bytes:
    """The picture, the same to the bit for the same graph.

    Args:
        kind: `png` or `svg`; an SVG's text is drawn as shapes, and asks no network for a font.
    """
    layout = lay_out(graph)
    rows = max(len(layout.left), len(layout.right), 1)
    figure = Figure(figsize=(10, (rows + 3) * ROW_INCHES))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(rows + 1, -2))
    axes.set_axis_off()
    places: dict[str, tuple[float, float]] = {}
    lower, upper = (sae.layer for sae in graph.saes)
    for column, x, align, layer in (
        (layout.left, LEFT, "right", lower),
        (layout.right, RIGHT, "left", upper),
    ):
        heading = {"color": DIM, "size": 9, "ha": align, "va": "center"}
        axes.text(x, -0.6, f"layer {layer}", **heading)
        for at, node in enumerate(column):
            y = (at + 0.5) * rows / len(column)
            places[node.id] = (x, y)
            # Labels are others' text, and a $ begins mathematics.
            style = {"color": INK, "size": 8, "ha": align, "va": "center", "parse_math": False}
            axes.text(x, y, _named(node), **style)
    for edge, strength in layout.edges:
        (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
        points = [(x0 + 0.008, y0), (0.5, y0), (0.5, y1), (x1 - 0.008, y1)]
        codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
        axes.add_patch(
            PathPatch(
                Curve(points, codes),
                facecolor="none",
                edgecolor=LESS if strength < 0 else MORE,
                linewidth=0.5 + 3.5 * abs(strength),
                alpha=0.35 + 0.5 * abs(strength),
            )
        )
    cut = f"; {len(layout.edges)} of {len(graph.edges)} edges"
    text = f"by {graph.by}; blue excites, red inhibits"
    text += cut if len(layout.edges) < len(graph.edges) else ""
    axes.text(0.5, -1.4, text, color=DIM, size=8, ha="center", va="center")
    return _saved(figure, kind)


def _saved(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    about = {"Date": None, "Creator": "neuroscope"} if kind == "svg" else {"Software": "neuroscope"}
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "neuroscope"}):
        warnings.filterwarnings("ignore", "Glyph")  # scripts that its font has not
        figure.savefig(file, format=kind, dpi=DPI, metadata=about)
    return file.getvalue()


def _named(node: Node) -> str:
    parts = (node.id, node.label, "(unreliable)" if node.unreliable else None)
    return clean_label(" ".join(part for part in parts if part), CHARS)
