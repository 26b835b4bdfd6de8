"""What one reader wants to see of the events, and in which format.

The plain view hands on the bytes every reader shares; only `top_k`, `dense` and `align=predict`
make new JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from neuroscope_vllm.core import events
from neuroscope_vllm.server.traces import Event

Style = Literal["sse", "ndjson", "openai"]
TOKEN_EVENTS = frozenset({"prompt", "token"})
"""The events a reader may leave out; all others always come."""

_decoder = msgspec.json.Decoder(events.TokenEvent)


@dataclass(frozen=True, slots=True)
class View:
    style: Style = "sse"
    include: frozenset[str] = TOKEN_EVENTS
    layer: int | None = None
    top_k: int | None = None
    align: Literal["self", "predict"] = "self"
    dense: bool | None = None
    """True: dense features alone; False: all others."""

    @property
    def opening(self) -> bytes:
        return b"retry: 3000\n\n" if self.style == "sse" else b""

    @property
    def ending(self) -> bytes:
        return b"data: [DONE]\n\n" if self.style == "openai" else b""

    def render(self, batch: list[Event]) -> bytes:
        """Bytes of the events this reader wants; may be empty."""
        kept = [event for event in batch if self._wants(event)]
        if self.align == "predict" or self.top_k is not None or self.dense is not None:
            kept = [self._altered(event) for event in kept]
        if self.style == "sse":
            return b"".join([event.frame for event in kept])
        before, after = (b"", b"\n") if self.style == "ndjson" else (b"data: ", b"\n\n")
        return b"".join([b"%b%b%b" % (before, named_json(event), after) for event in kept])

    def _wants(self, event: Event) -> bool:
        if event.name in TOKEN_EVENTS and event.name not in self.include:
            return False
        return self.layer is None or event.layer is None or event.layer == self.layer

    def _altered(self, event: Event) -> Event:
        if event.name not in TOKEN_EVENTS:
            return event
        token = _decoder.decode(event.json)
        if self.align == "predict":
            _shift(token, _previous(event))
        if self.dense is not None:
            token.top_features = [f for f in token.top_features if f.dense == self.dense]
        if self.top_k is not None:
            token.top_features = token.top_features[: self.top_k]
        json = events.encoder.encode(token)
        return Event.make(event.seq, event.name, event.layer, event.id, json, None)


def named_json(event: Event) -> bytes:
    """The event's JSON with its name, and its id where it has one, inside."""
    head = b'{"event":"%b",' % event.name.encode()
    if event.id is not None:
        head += b'"id":"%b",' % event.id
    return head + event.json[1:]


def _previous(event: Event) -> events.TokenEvent | None:
    """The token one position earlier, at the same layer, if it is still kept."""
    if event.trace is None:
        return None
    at = event.at - 1
    while (before := event.trace.get(at)) is not None:
        if before.name in TOKEN_EVENTS and before.layer == event.layer:
            return _decoder.decode(before.json)
        at -= 1
    return None


def _shift(token: events.TokenEvent, previous: events.TokenEvent | None) -> None:
    """Give a token the features of the state that chose it."""
    known = previous is not None and previous.features_at is not None
    token.features_at = "previous" if known else None
    token.top_features = previous.top_features if previous else []
    token.l0 = previous.l0 if previous else None
    token.sink = previous.sink if previous else False
    token.steered = previous.steered if previous else []
