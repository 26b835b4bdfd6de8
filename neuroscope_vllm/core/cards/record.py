"""The feature card as readers get it, and how one is asked for. Torch-free."""

from __future__ import annotations

import msgspec

from neuroscope_vllm.core.wire import Site

WEIGHTS = ("promoted", "suppressed", "neighbours")


class Histogram(msgspec.Struct, frozen=True):
    """Firings by activation: `counts[i]` between `edges[i]` and `edges[i + 1]`, log-spaced."""

    edges: list[float]
    counts: list[int]


class ShownExample(msgspec.Struct, frozen=True):
    """A text in which the feature fires at `tokens[at]`, with its activation on every token."""

    activation: float
    tokens: list[str]
    activations: list[float]
    at: int


class Quantile(msgspec.Struct, frozen=True, rename={"low": "from", "high": "to"}):
    """Some of a uniform sample of all firings, of activations from `low` to `high`."""

    low: float
    high: float
    examples: list[ShownExample]


class Examples(msgspec.Struct, frozen=True):
    """The strongest, and quarters of a sample, strongest first."""

    top: list[ShownExample]
    quantiles: list[Quantile]


class TokenLogit(msgspec.Struct, frozen=True):
    """A token and what the decoder vector adds to its logit, up to the final norm's scale."""

    token_id: int
    token: str
    logit: float


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """Another feature by the cosine of the two decoder vectors."""

    index: int
    cosine: float
    label: str | None = None
    unreliable: bool = False


class Card(msgspec.Struct, kw_only=True):
    """All that is not labels.

    Attributes:
        density: Share of the calibration's `tokens` on which it fires.
        firings: How many of them.
        mean: Activation where it fires.
        max: The largest seen.
        dense: It fires on more than a tenth.
        missing: By field that is null for want of something: what, and how to have it.
    """

    layer: int
    index: int
    width: int
    sae: str
    density: float | None = None
    firings: int | None = None
    tokens: int | None = None
    mean: float | None = None
    max: float | None = None
    dense: bool = False
    histogram: Histogram | None = None
    examples: Examples | None = None
    promoted: list[TokenLogit] | None = None
    suppressed: list[TokenLogit] | None = None
    neighbours: list[Neighbour] | None = None
    neuronpedia: str | None = None
    missing: dict[str, str] = {}


class Wanted(msgspec.Struct, frozen=True):
    """What a reader process is asked, a line of JSON.

    Attributes:
        model: Folder of the served model, or repository@revision; None: not known.
        weights: Whether to read what takes the SAE's and the model's weights, WEIGHTS.
    """

    site: Site
    index: int
    model: str | None
    weights: bool = True


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of JSON: one of the two."""

    card: Card | None = None
    error: str | None = None
