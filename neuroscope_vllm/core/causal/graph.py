"""The record of a trace, which is also its JSON.

Its fields are the schema: those of `Graph`, whose `nodes` are `Node` and whose `edges` are `Edge`.
A consumer checks `schema`, which changes with the meaning of a field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import msgspec
import numpy as np

from neuroscope_vllm.core.artefacts import pinned
from neuroscope_vllm.core.causal.edges import Edges
from neuroscope_vllm.core.causal.firings import JointFirings
from neuroscope_vllm.core.causal.pair import Pair
from neuroscope_vllm.core.causal.store import Observation
from neuroscope_vllm.core.labels import Label, LabelSet, stored_labels
from neuroscope_vllm.core.sae.sae import SAE

SCHEMA = "neuroscope-causal-graph/1"
PATH = "direct residual path; attention and MLPs between the layers are not in it"

Tokens = Callable[[SAE, Sequence[int]], tuple[list[list[str]], list[list[str]]]]
"""(tokens that each feature promotes, those that it suppresses), strongest first."""


class GraphSAE(msgspec.Struct, frozen=True, kw_only=True):
    """An SAE of a graph. `source` is a path or address, a hub's at its commit."""

    layer: int
    source: str
    digest: str
    width: int


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A feature.

    Attributes:
        id: layer:index.
        layer, index: The feature.
        label: None: it has none.
        labeller: Who wrote it.
        score: How well the label predicts the feature, 0 to 1; None: unscored.
        unreliable: Whether it scored little better than chance.
        frequency: Share of tokens that it fires on; None: not measured, here and below.
        mean_activation: Over all tokens.
        promotes, suppresses: Tokens that its decoder direction makes likelier or less likely, read
            straight through the final norm and the unembedding; None: no model was given.
    """

    id: str
    layer: int
    index: int
    label: str | None = None
    labeller: str | None = None
    score: float | None = None
    unreliable: bool = False
    frequency: float | None = None
    mean_activation: float | None = None
    promotes: list[str] | None = None
    suppresses: list[str] | None = None


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """From a feature of the earlier layer to one of the later; formulas are in `causal.pair`.

    Attributes:
        source, target: Ids of nodes.
        weight: V.
        cosine: Of the two decoder directions.
        era, twera: None: not measured, as is `together`.
        together: Tokens on which both fire.
    """

    source: str
    target: str
    weight: float
    cosine: float
    era: float | None = None
    twera: float | None = None
    together: int | None = None


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """
    Attributes:
        schema: SCHEMA.
        neuroscope: Version that made it.
        path: What influence is meant.
        saes: The earlier layer's, then the later's.
        features: Those that were asked about, as layer:index; of none, all pairs were looked at.
        by: What edges are chosen by: their absolute `weight`, `era` or `twera`.
        top: Edges that were asked for, of each of `features` or in all.
        max_cosine: Pairs of a larger decoder cosine were left out.
        model: Whose tokens nodes promote.
        observation: Where ERA, TWERA and frequencies are from; None: from nothing but weights.
        nodes: The earlier layer's, then the later's, by index.
        edges: Strongest first, of each feature in the order of `features`.
    """

    schema: str = SCHEMA
    neuroscope: str
    path: str = PATH
    saes: list[GraphSAE]
    features: list[str]
    by: str
    top: int
    max_cosine: float | None
    model: str | None
    observation: Observation | None
    nodes: list[Node]
    edges: list[Edge]


def graph_of(
    pair: Pair,
    edges: Edges,
    *,
    by: str,
    top: int,
    features: Sequence[tuple[int, int]] = (),
    max_cosine: float | None = None,
    measured: tuple[JointFirings, Observation] | None = None,
    model: str | None = None,
    tokens: Tokens | None = None,
) -> Graph:
    """The graph of some edges, with what is known of their features.

    Args:
        features: (layer, index) of those that were asked about; nodes also without an edge.
        tokens: Of `model`.
    """
    firings, observation = measured or (None, None)
    nodes = []
    for layer, sae, ends in (
        (pair.lower_layer, pair.lower, edges.lower),
        (pair.upper_layer, pair.upper, edges.upper),
    ):
        asked = [index for at, index in features if at == layer]
        indices = sorted({*asked, *ends.tolist()})
        counts = _counts(firings, layer == pair.lower_layer, indices)
        promoted = tokens(sae, indices) if tokens is not None else (None, None)
        nodes += _nodes(layer, sae, indices, counts, promoted)
    return Graph(
        neuroscope=version("neuroscope-vllm"),
        saes=[_sae(pair.lower_layer, pair.lower), _sae(pair.upper_layer, pair.upper)],
        features=[f"{layer}:{index}" for layer, index in features],
        by=by,
        top=top,
        max_cosine=max_cosine,
        model=model,
        observation=observation,
        nodes=nodes,
        edges=_edges(pair, edges),
    )


def _sae(layer: int, sae: SAE) -> GraphSAE:
    source = pinned(sae.info.source, sae.info.revision)
    return GraphSAE(layer=layer, source=source, digest=sae.digest, width=sae.width)


def _counts(
    firings: JointFirings | None, lower: bool, indices: list[int]
) -> Mapping[int, tuple[float, float]]:
    """(frequency, mean activation) of features."""
    if firings is None:
        return {}
    count, mean = (
        (firings.lower_count, firings.lower_mean)
        if lower
        else (firings.upper_count, firings.upper_mean)
    )
    return {i: (int(count[i]) / max(firings.tokens, 1), float(mean[i])) for i in indices}


def _nodes(
    layer: int,
    sae: SAE,
    indices: list[int],
    counts: Mapping[int, tuple[float, float]],
    promoted: tuple[list[list[str]] | None, list[list[str]] | None],
) -> list[Node]:
    known = list(stored_labels(sae.info.source).values())
    promotes, suppresses = promoted
    nodes = []
    for at, index in enumerate(indices):
        label = _label(known, index)
        frequency, mean = counts.get(index, (None, None))
        nodes.append(
            Node(
                id=f"{layer}:{index}",
                layer=layer,
                index=index,
                label=label.text if label else None,
                labeller=label.labeller if label else None,
                score=label.score if label else None,
                unreliable=label.unreliable if label else False,
                frequency=frequency,
                mean_activation=mean,
                promotes=promotes[at] if promotes is not None else None,
                suppresses=suppresses[at] if suppresses is not None else None,
            )
        )
    return nodes


def _label(known: Sequence[LabelSet], index: int) -> Label | None:
    return next((found for one in known if (found := one.get(index)) is not None), None)


def _edges(pair: Pair, edges: Edges) -> list[Edge]:
    rows = zip(*(np.asarray(column).tolist() for column in edges), strict=True)
    return [
        Edge(
            source=f"{pair.lower_layer}:{lower}",
            target=f"{pair.upper_layer}:{upper}",
            weight=weight,
            cosine=cosine,
            era=None if math.isnan(era) else era,
            twera=None if math.isnan(twera) else twera,
            together=None if together < 0 else together,
        )
        for lower, upper, weight, cosine, era, twera, together in rows
    ]
