"""Where the nodes of a picture go: two columns, ordered so that few edges cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from neuroscope_vllm.core.causal.graph import Edge, Graph, Node

DRAWN = 60
"""Edges of a picture: of more, none can be made out."""


class Layout(NamedTuple):
    """What is drawn, both columns from the top.

    Attributes:
        left, right: Nodes of the earlier and of the later layer.
        edges: Of them, with their strength, 0 to 1 of the strongest, negative where they inhibit.
    """

    left: list[Node]
    right: list[Node]
    edges: list[tuple[Edge, float]]


def lay_out(graph: Graph) -> Layout:
    value = {id(edge): float(getattr(edge, graph.by) or 0.0) for edge in graph.edges}
    drawn = sorted(graph.edges, key=lambda edge: -abs(value[id(edge)]))[:DRAWN]
    most = max((abs(value[id(edge)]) for edge in drawn), default=0.0) or 1.0
    edges = [(edge, value[id(edge)] / most) for edge in drawn]
    shown = {end for edge in drawn for end in (edge.source, edge.target)} | set(graph.features)
    lower, upper = (sae.layer for sae in graph.saes)
    left = [node for node in graph.nodes if node.layer == lower and node.id in shown]
    right = [node for node in graph.nodes if node.layer == upper and node.id in shown]
    for _ in range(4):
        right = _by_neighbours(right, left, [(e.target, e.source, abs(s)) for e, s in edges])
        left = _by_neighbours(left, right, [(e.source, e.target, abs(s)) for e, s in edges])
    return Layout(left, right, edges)


def _by_neighbours(
    nodes: Sequence[Node], others: Sequence[Node], edges: Sequence[tuple[str, str, float]]
) -> list[Node]:
    """By the mean place of the nodes that each is joined to, weighted by strength."""
    place = {node.id: at / max(len(others), 1) for at, node in enumerate(others)}
    pull = {node.id: (0.0, 0.0) for node in nodes}
    for own, other, strength in edges:
        weighted, total = pull[own]
        pull[own] = (weighted + strength * place[other], total + strength)
    return sorted(nodes, key=lambda node: pull[node.id][0] / (pull[node.id][1] or 1.0))
