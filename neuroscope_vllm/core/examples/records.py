"""What `collect` keeps of a corpus. Torch-free."""

from __future__ import annotations

import hashlib

import msgspec

TOP, SAMPLE = "top", "sample"


class Collection(msgspec.Struct, frozen=True, kw_only=True):
    """Where examples are from.

    Attributes:
        sae: Path or address, a hub's at its commit.
        sae_digest: Of the SAE's weights.
        sae_input: What the SAE read, `raw` or `rms`.
        layer: The layer it read.
        model, corpus: Likewise, for people.
        created: ISO date of the start of the run.
        width: Features of the SAE.
        samples: Sequences.
        tokens: Tokens that features could fire on: neither special nor sinks.
        before, after: Tokens of context on either side of an example's own, at most.
        top, sample: Examples a feature, at most, of either kind.
        sink_norm: Tokens with a residual norm above were left out.
    """

    sae: str
    sae_digest: str
    sae_input: str = "raw"
    layer: int
    model: str
    corpus: str
    created: str
    width: int
    samples: int
    tokens: int
    before: int
    after: int
    top: int
    sample: int
    sink_norm: float | None = None

    @property
    def name(self) -> str:
        """Which weights and which texts: two digests, of 8 digits each. The same corpus gives the
        same texts, whenever it is collected."""
        texts = msgspec.structs.replace(self, created="", sae="", sae_digest="", sink_norm=None)
        digest = hashlib.sha256(msgspec.json.encode(texts)).hexdigest()
        return f"{self.sae_digest[:8]}.{digest[:8]}"


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A token on which a feature fires, in its context.

    Attributes:
        feature: The feature.
        kind: TOP, one of its strongest; or SAMPLE, one of a uniform sample of all its firings, in
            which its activation quantiles are therefore the corpus's. A token may be both.
        activation: On the token.
        sequence, position: Where the token is in the corpus.
        held_out: Whether it is kept from labellers, for scoring: all of a sequence is, or nothing.
        tokens: The context's texts, which joined give the text; special tokens as they are written.
        activations: The feature's, on each of these.
        at: Which of these the token is.
    """

    feature: int
    kind: str
    activation: float
    sequence: int
    position: int
    held_out: bool
    tokens: list[str]
    activations: list[float]
    at: int


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a held-out sequence, with all that fires in it: what features are *not* about.

    Attributes:
        sequence, position: Where its first token is.
        tokens: Texts, `before + 1 + after` of them.
        features: Those that fire on some token of it, ascending.
        activations: The largest of each.
    """

    sequence: int
    position: int
    tokens: list[str]
    features: list[int]
    activations: list[float]


class FeatureSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A feature in the corpus.

    Attributes:
        firings: Tokens it fired on.
        max_activation: The largest.
        partners: Features that often fire on the same token, most often first.
        together: On how many tokens, for each partner; a lower bound.
    """

    feature: int
    firings: int
    max_activation: float
    partners: list[int]
    together: list[int]
