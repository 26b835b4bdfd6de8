"""What the server's answers are, besides events (`core.events`) and traces."""

from __future__ import annotations

from typing import Any

import msgspec

from neuroscope_vllm.core.cards import record
from neuroscope_vllm.core.labels import label


class Label(label.Label, frozen=True, omit_defaults=True):
    """A feature's label, and the layer whose SAE has the feature."""

    layer: int | None = None


class Card(record.Card, kw_only=True):
    """All that the server knows of a feature.

    Attributes:
        label: The one that is shown; None: unlabelled.
        labels: Of every labeller, that one first.
    """

    label: Label | None = None
    labels: list[Label] = msgspec.field(default_factory=list[Label])


class SteeredChoice(msgspec.Struct, frozen=True):
    """What became of a change of steering, of one choice.

    Attributes:
        internal_id: The engine's id.
        position: From which on it holds; None where it failed.
        steering: As it is now: edits, rules, doses; None: not steered, or it failed.
        error: One sentence; None: it was done.
    """

    internal_id: str
    position: int | None = None
    steering: dict[str, Any] | None = None
    error: str | None = None


class Steered(msgspec.Struct, frozen=True):
    """The answer to a change of steering."""

    request_id: str
    choices: list[SteeredChoice]


class Site(msgspec.Struct, frozen=True):
    """An observed layer."""

    layer: int
    ranking: str
    top_k: int
    sae: dict[str, Any]


class Described(msgspec.Struct, frozen=True):
    """What is observed: the part of /v1/features/describe that the client uses."""

    model: str
    sites: list[Site]
    special_token_ids: list[int] = []


class LabelPage(msgspec.Struct, frozen=True):
    data: list[Label]
    total: int
