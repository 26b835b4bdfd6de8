"""What a text's features are: the record that `neuroscope inspect` prints. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

import msgspec

from neuroscope_vllm.core.events import Feature, TokenEvent


class Token(msgspec.Struct, kw_only=True):
    """A token and its features at one layer, as in `TokenEvent`.

    Attributes:
        top_features: Best score first; none of sinks and special tokens.
        l0: Active features; None where they are not known, and of special tokens.
        features_at: None where the model's features of it were lost, and of special tokens.
        sink: An attention sink: its residual norm drowns every feature.
        special: A mark such as the first token of every text, and no text.
    """

    position: int
    token: str
    token_id: int
    layer: int
    top_features: list[Feature]
    l0: int | None
    features_at: Literal["self"] | None
    sink: bool = False
    special: bool = False

    @property
    def note(self) -> str | None:
        """Why it has no features; None if it has some, or just none that are active."""
        if self.special:
            return "special token"
        if self.sink:
            return "attention sink"
        return None if self.features_at else "no features: never run, or lost"


class Site(msgspec.Struct, kw_only=True):
    """An observed layer: what read it, and in which order features are shown."""

    layer: int
    sae: str
    ranking: str
    top_k: int


class Tracked(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A feature that was asked for, on every token, whatever its rank.

    Attributes:
        activations: By position; 0 where it is inactive, None on sinks and special tokens.
        unreliable: The label scored little better than chance.
    """

    layer: int
    index: int
    label: str | None
    activations: list[float | None]
    unreliable: bool = False


class Inspection(msgspec.Struct, kw_only=True):
    """One text. As JSON this is what `neuroscope inspect --json` prints, one a line.

    Attributes:
        text: As given; of a chat, the user's message.
        file: Where the text came from, `-` for stdin; None: the command line.
        chat: Whether the text went through the chat template.
        model: As served, or folder or hub id.
        source: What computed it: a server's URL, or the backend, `vllm` or `transformers`.
        sites: By layer.
        tokens: By position, then layer; special tokens of the context included.
        features: Those asked for, each at every layer.
    """

    text: str
    file: str | None
    chat: bool
    model: str
    source: str
    sites: list[Site]
    tokens: list[Token]
    features: list[Tracked]


Firings = dict[int, dict[int, list[tuple[int, float]]]]
"""By layer and feature: the positions where it fires, and its activations there."""


class Inspected(NamedTuple):
    """A record, and where its features fire besides; None: only known as far as they are top."""

    record: Inspection
    firings: Firings | None


def of_events(events: Iterable[TokenEvent], special_ids: Collection[int]) -> list[Token]:
    """What a server told of tokens. Those of which it knows no layer yet are left out."""
    return [_of_event(e, e.token_id in special_ids) for e in events if e.layer is not None]


def _of_event(event: TokenEvent, special: bool) -> Token:
    assert event.layer is not None
    known = event.features_at is not None and not special
    return Token(
        position=event.position,
        token=event.token,
        token_id=event.token_id,
        layer=event.layer,
        top_features=event.top_features if known else [],
        l0=event.l0 if known else None,
        features_at="self" if known else None,
        sink=event.sink and known,
        special=special,
    )
