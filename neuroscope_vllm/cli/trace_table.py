"""How a trace is shown: in a terminal, and as a page."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuroscope_vllm.core.causal.graph import Edge, Graph, Node
from neuroscope_vllm.core.causal.layout import lay_out
from neuroscope_vllm.core.html_page import filled

WEIGHTS_ONLY = (
    "From weights alone: it is not known which of these fire together, so some edges may never be"
    " used. Watch both layers with a MODEL and --corpus."
)


def print_graph(graph: Graph) -> None:
    console = Console()
    console.print(Text(_title(graph), style="bold"))
    table = Table(box=None, pad_edge=False)
    for name in ("from", "to"):
        table.add_column(name, overflow="fold")
    for name in _columns(graph):
        table.add_column(name, justify="right", no_wrap=True)
    nodes = {node.id: node for node in graph.nodes}
    for edge in graph.edges:
        ends = (Text(_named(nodes[end])) for end in (edge.source, edge.target))
        table.add_row(*ends, *_figures(graph, edge))
    console.print(table)
    if any(node.promotes is not None for node in graph.nodes):
        console.print(_tokens(graph))
    for line in _notes(graph):
        console.print(Text(line, style="dim"))


def graph_page(graph: Graph) -> str:
    """One HTML file."""
    layout = lay_out(graph)
    drawn = [(edge.source, edge.target, strength) for edge, strength in layout.edges]
    data = {
        "title": _title(graph),
        "about": _notes(graph),
        "layers": [sae.layer for sae in graph.saes],
        "left": [node.id for node in layout.left],
        "right": [node.id for node in layout.right],
        "drawn": drawn,
        "nodes": {node.id: _node(node) for node in graph.nodes},
        "columns": _columns(graph),
        "edges": [(e.source, e.target, _figures(graph, e)) for e in graph.edges],
    }
    return filled("neuroscope_vllm.core.causal", "graph.html", data)


def _title(graph: Graph) -> str:
    lower, upper = (sae.layer for sae in graph.saes)
    asked = f" of {', '.join(graph.features)}" if graph.features else ""
    return f"Layer {lower} to layer {upper}: strongest edges{asked}, by {graph.by}"


def _columns(graph: Graph) -> list[str]:
    measured = ["era", "twera", "together"] if graph.observation else []
    return ["weight", *measured, "cosine"]


def _figures(graph: Graph, edge: Edge) -> list[str]:
    measured = (
        [f"{edge.era:+.3g}", f"{edge.twera:+.3g}", f"{edge.together:,}"]
        if graph.observation
        else []
    )
    return [f"{edge.weight:+.3f}", *measured, f"{edge.cosine:.2f}"]


def _named(node: Node) -> str:
    return " ".join(filter(None, (node.id, node.label, "(unreliable)" if node.unreliable else "")))


def _node(node: Node) -> dict[str, Any]:
    lines = []
    if node.frequency is not None:
        lines.append(f"fires on {node.frequency:.3%} of tokens")
    if node.promotes:
        lines.append(f"promotes {_quoted(node.promotes)}")
    if node.suppresses:
        lines.append(f"suppresses {_quoted(node.suppresses)}")
    return {"label": node.label or "", "unreliable": node.unreliable, "lines": lines}


def _tokens(graph: Graph) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("feature", "promotes", "suppresses"):
        table.add_column(name, overflow="fold")
    for node in graph.nodes:
        if node.promotes or node.suppresses:
            both = (_quoted(tokens or []) for tokens in (node.promotes, node.suppresses))
            table.add_row(node.id, *map(Text, both))
    return table


def _quoted(tokens: list[str]) -> str:
    return ", ".join(f"“{token}”" for token in tokens)


def _notes(graph: Graph) -> list[str]:
    lower, upper = graph.saes
    read = f"{lower.source} (layer {lower.layer}) to {upper.source} (layer {upper.layer})"
    notes = [f"{read}: the {graph.path}."]
    if graph.max_cosine is not None:
        notes.append(f"Pairs of a decoder cosine above {graph.max_cosine:g} are left out.")
    if not graph.edges:
        notes.append("There is no such edge.")
    seen = graph.observation
    if seen is None:
        return [*notes, WEIGHTS_ONLY]
    text = f"{seen.tokens:,} tokens of {seen.corpus} ({seen.model}, {seen.created})"
    left_out = f"{seen.left_out:,} special tokens and sinks were left out"
    return [*notes, f"era and twera from {text}; {left_out}."]
