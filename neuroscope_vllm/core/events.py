"""What a reader of the feature stream receives. Torch-free.

One Struct per event; `EVENTS` names them as the SSE `event:` line does. On NDJSON and with
`format=openai`, where there is no such line, the name travels inside as `"event"`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Feature(msgspec.Struct, omit_defaults=True, gc=False):
    """One SAE feature on one token. `activation` is in the residual's own units."""

    index: int
    label: str | None
    activation: float
    score: float
    dense: bool = False
    """It fires on more than a tenth of all tokens, so it says little about this one."""
    unreliable: bool = False
    """The label scored little better than chance."""


class SteeredFeature(msgspec.Struct, gc=False):
    """A feature that is edited at this layer, on one token: its activation as the model computed it
    and as the layers above get it."""

    index: int
    before: float
    after: float


class RequestEvent(msgspec.Struct, omit_defaults=True, gc=False):
    """First event of every choice. `created` is in unix seconds, `prompt_tokens` a count."""

    request_id: str
    internal_id: str
    choice: int
    model: str
    prompt_tokens: int
    created: float
    layers: list[int]
    dp_rank: int
    lora: str | None = None
    retold: bool = False
    """The side process was started again, or missed something, and tells this request anew."""
    steering: dict[str, Any] | None = None
    """How it is steered: edits, rules, doses (largest change of each layer over the usual
    residual's norm) and warnings."""
    beam: bool = False
    """One step of beam `choice`: beam search runs a new request per token and beam, each with
    all tokens so far as its prompt."""
    traceparent: str | None = None
    """The client's W3C trace context, where vLLM itself exports traces."""


class TokenEvent(msgspec.Struct, omit_defaults=True, gc=False):
    """A token and its features; one event per observed layer.

    Also the form of `prompt` events, which carry `phase` and no `token_index`. `features_at` is
    null where the model never ran on the token or its features were lost; `layer` is null while
    no worker has said which layers it observes.
    """

    request_id: str
    choice: int
    token_index: int | None
    position: int
    token: str
    token_id: int
    layer: int | None
    top_features: list[Feature]
    l0: int | None
    features_at: Literal["self", "previous"] | None
    phase: Literal["prompt"] | None = None
    cached: bool = False
    """Served from vLLM's prefix cache. The features are those of an earlier request with the same
    tokens up to here, none where they are no longer kept."""
    sink: bool = False
    """An attention sink: its residual norm drowns every feature, so none is ranked."""
    internal_id: str | None = None
    """The engine's id; tells two requests apart that a client gave the same id."""
    steered: list[SteeredFeature] = []
    """Features that were edited here; none where the token is cached."""


GapReason = Literal["dropped", "slow_reader", "evicted", "restarted"]


class GapEvent(
    msgspec.Struct, rename={"start": "from", "stop": "to"}, omit_defaults=True, gc=False
):
    """Something is missing, and how much.

    `dropped`: features of positions [from, to) of one choice were lost on their way here; the
    tokens follow without features. `slow_reader`: `count` events went by faster than this reader
    took them. `evicted`: `count` events are no longer kept. `restarted`: the side process is not
    the one that gave the reader its last event id, so nobody knows how many.
    """

    reason: GapReason
    request_id: str | None = None
    choice: int | None = None
    start: int | None = None
    stop: int | None = None
    count: int | None = None
    internal_id: str | None = None


class RuleEvent(msgspec.Struct, omit_defaults=True, gc=False):
    """The token at `position` met the condition of a rule: `feature` of `layer` was that active."""

    request_id: str
    choice: int
    position: int
    rule: str
    layer: int
    feature: int
    activation: float
    label: str | None = None
    tag: str | None = None
    stop: bool = False
    """The answer ends."""
    internal_id: str | None = None


class SteeringEvent(msgspec.Struct, gc=False):
    """The choice is steered otherwise from `position` on; null: not any more."""

    request_id: str
    choice: int
    position: int
    steering: dict[str, Any] | None
    internal_id: str | None = None


class DoneEvent(msgspec.Struct, gc=False):
    """Last event of every choice. `dropped` counts positions whose features were lost."""

    request_id: str
    choice: int
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    dropped: int
    internal_id: str | None = None


class ErrorBody(msgspec.Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEvent(msgspec.Struct):
    """Something went wrong with a request after it began, e.g. its engine went away."""

    request_id: str
    choice: int
    error: ErrorBody
    internal_id: str | None = None


class GoodbyeEvent(msgspec.Struct):
    """The side process shuts down; connect again later, with the last event id."""

    reason: str


EVENTS: dict[str, type[msgspec.Struct]] = {
    "request": RequestEvent,
    "prompt": TokenEvent,
    "token": TokenEvent,
    "rule": RuleEvent,
    "steering": SteeringEvent,
    "gap": GapEvent,
    "done": DoneEvent,
    "error": ErrorEvent,
    "goodbye": GoodbyeEvent,
}

encoder = msgspec.json.Encoder()
