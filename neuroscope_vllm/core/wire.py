"""Messages from the engine to the hub, and their encoding. Torch-free.

Two kinds of sender live in an engine. The *scheduler* knows the truth about tokens: which
requests exist, what was sampled, what stands after stops and rejected drafts. The *worker*
knows the features of the rows it ran. The hub joins the two by (internal_id, position), so a
worker never has to know about speculation, preemption or an extra forward after EOS.

`engine` names one engine core among all that send to a hub: vLLM's instance and its data-parallel
rank.

Encoding is msgpack through msgspec, typed on both ends; arrays travel as little-endian bytes.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.steering.spec import SteeringSpec

WIRE_VERSION = 5
MAX_MESSAGE = 64 << 20
"""Bytes. The hub hangs up on who sends more, so senders drop it."""


class Site(msgspec.Struct, frozen=True):
    """One observed layer and what reads it."""

    layer: int
    sae: SAEInfo
    ranking: str
    top_k: int
    sink_norm: float | None
    """Rows with a larger residual L2 norm are attention sinks; None without calibration."""
    dtype: str = ""
    """Of the residuals: the precision the model runs in, e.g. "bfloat16"."""
    calibration: str | None = None
    sae_input: str = "raw"
    max_frequency: float = 0.5
    dense: list[int] = []
    """Features that fire on more than a tenth of the calibration's tokens."""


class SelfTest(msgspec.Struct, frozen=True):
    """What a known text showed at one layer when the worker started.

    The figures are over `tokens` positions, attention sinks left out; without any where the text
    is too short, or where there is no tokenizer to make it known.
    """

    layer: int
    tokens: int = 0
    l0: float | None = None
    expected_l0: float | None = None
    """By the calibration, or as the SAE's publisher names it."""
    explained_variance: float | None = None
    warning: str | None = None
    failure: str | None = None
    """The hook is dead; the server stops."""


class Hello(msgspec.Struct, tag="hello"):
    """Sent by every sender on connect and then once a second, so that a restarted hub learns all.

    `counters` are totals since the sender started, e.g. rows_observed, rows_encoded,
    messages_dropped.
    """

    sender: str
    role: str  # "worker" | "scheduler"
    engine: str
    dp_rank: int
    model: str
    wire_version: int = WIRE_VERSION
    armed: bool = False
    host: str = ""  # its name, of the machine or the container
    device: str = ""  # e.g. "NVIDIA H200" or "cpu", workers only
    runner: str = ""  # "v1" | "v2", workers only
    cudagraph_mode: str = ""  # vLLM's name, e.g. "FULL_AND_PIECEWISE"; "NONE" when off
    sites: list[Site] = []
    warnings: list[str] = []
    counters: dict[str, int] = {}
    self_test: list[SelfTest] = []
    """Workers only, one a layer; empty until it has run."""


class RequestStarted(msgspec.Struct, tag="request"):
    """A choice of a request was admitted by the scheduler. One message per internal id."""

    internal_id: str
    request_id: str  # as the client sees it, e.g. "chatcmpl-abc"
    choice: int
    engine: str
    dp_rank: int
    prompt_token_ids: bytes  # int32[prompt_len]
    created: float  # unix seconds
    layers: list[int] = []
    """Observed ones."""
    stop: list[str] = []
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    """Stop strings do not count before this many tokens."""
    spaces_between_special_tokens: bool = True
    lora: str | None = None
    beam: bool = False
    """One step of one beam: beam search runs a new request for every token of every beam."""
    prefix_root: bytes = b""
    """Requests of equal root may share prefix-cache blocks: a digest of LoRA and cache salt."""
    edited_from: int | None = None
    """From this position on, only with requests of an equal `edit_salt`."""
    edit_salt: bytes = b""
    steering: dict[str, Any] | None = None
    """How it is steered, for readers; `Steering.describe`."""
    traceparent: str | None = None
    """The client's W3C trace context, where the engine traces and so keeps it."""
    secret: bytes | None = None
    """Digest of its stream secret; None: it has none."""


class RequestScheduled(msgspec.Struct, tag="scheduled"):
    """A choice runs for the first time; its first `cached_tokens` come from the prefix cache."""

    internal_id: str
    cached_tokens: int


class Sampled(msgspec.Struct):
    """Tokens of one choice that stand, in order, after a step."""

    internal_id: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error" | "repetition"
    stop_reason: int | str | None = None  # the stop token or string, as vLLM reports it
    at: int | None = None
    """Tokens generated before these; tells a hub that it missed some, or has them already."""
    computed_tokens: int | None = None
    """Of an aborted choice: positions from here on never ran. None: all but the last token did."""


class TokensSampled(msgspec.Struct, tag="tokens"):
    """Everything the scheduler accepted in one step. Aborts come as a Sampled without tokens."""

    sampled: list[Sampled]
    sent_at: float | None = None
    """As in StepFeatures."""


class Live(msgspec.Struct):
    """A choice that runs or ended a short while ago, and its tokens so far."""

    started: RequestStarted
    token_ids: list[int]
    cached_tokens: int | None = None
    """None until it was scheduled for the first time."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    computed_tokens: int | None = None


class Resync(msgspec.Struct, tag="resync"):
    """All that one scheduler runs and what it lately ended; sent when messages were lost or the
    hub is a new one."""

    engine: str
    live: list[Live]


class Span(msgspec.Struct):
    """The rows [start, stop) of one request in a step."""

    internal_id: str
    start: int
    stop: int


class LayerFeatures(msgspec.Struct):
    """Top features of n rows at one layer; -1 pads `index` where fewer than k are active."""

    layer: int
    top_k: int
    index: bytes  # int32[n, top_k], best first
    activation: bytes  # float32[n, top_k], in the residual's own units
    score: bytes  # float32[n, top_k], of the ranking
    l0: bytes  # int32[n], active features before any filter
    sink: bytes  # uint8[n], 1 for attention sinks (their features are not ranked)


class SteeredRows(msgspec.Struct):
    """Activations of the features that are edited at one layer in the rows of one span; NaN where
    the edit was not in force."""

    span: int  # of StepFeatures.spans
    layer: int
    features: list[int]
    before: bytes  # float32[rows of the span, len(features)], in the residual's own units
    after: bytes  # likewise


class RuleHit(msgspec.Struct):
    """A token met the condition of one of its request's rules."""

    row: int
    layer: int
    feature: int
    activation: float
    rule: str
    tag: str | None = None
    stop: bool = False


class StepFeatures(msgspec.Struct, tag="features"):
    """Features of every row of one forward pass. Rows may turn out not to stand.

    Pipeline stages that own different layers send one message each for the same step.
    """

    engine: str
    spans: list[Span]
    positions: bytes  # int32[n], absolute in the request's context
    token_ids: bytes  # int32[n], the input token of each row
    layers: list[LayerFeatures]
    step: int
    """Counts the engine's forward passes; the same on all pipeline stages."""
    num_layers: int
    """Layers observed on all stages together."""
    steered: list[SteeredRows] = []
    hits: list[RuleHit] = []
    sent_at: float | None = None
    """Monotonic seconds when the sender took it; means something on the sender's host alone."""


class SteeringChanged(msgspec.Struct, tag="steering"):
    """What became of a `Steer` command."""

    command: str
    internal_id: str
    error: str | None = None
    """One sentence; then nothing changed."""
    status: int = 200
    """Of the HTTP answer."""
    position: int | None = None
    """From here on it is steered otherwise."""
    salt: bytes = b""
    """Of its prefix-cache blocks from there on."""
    steering: dict[str, Any] | None = None
    """`Steering.describe`; None: not any more."""


class Goodbye(msgspec.Struct, tag="goodbye"):
    """The sender shuts down in good order."""

    sender: str


Message = (
    Hello
    | RequestStarted
    | RequestScheduled
    | TokensSampled
    | Resync
    | StepFeatures
    | SteeringChanged
    | Goodbye
)


class Steer(msgspec.Struct, tag="steer"):
    """From the hub to a scheduler, the one thing that goes that way: steer a running choice
    otherwise. Answered by `SteeringChanged`."""

    command: str
    internal_id: str
    asked: SteeringSpec | None
    """None: not any more."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_command_decoder = msgspec.msgpack.Decoder(Steer)


def encode(message: Message | Steer) -> bytes:
    return _encoder.encode(message)


def weight(message: object) -> int:
    """Bytes that a message is of in memory, by its arrays: near enough to bound a queue."""
    match message:
        case StepFeatures():
            rows = len(message.positions)
            layers = sum(300 + 3 * len(one.index) + rows for one in message.layers)
            steered = sum(300 + 2 * len(one.before) for one in message.steered)
            few = len(message.spans) + len(message.hits)
            return layers + steered + 2 * rows + 300 * few
        case RequestStarted():
            return len(message.prompt_token_ids)
        case Resync():
            return sum(
                len(one.started.prompt_token_ids) + 8 * len(one.token_ids) for one in message.live
            )
    return 0


def decode_command(data: bytes | memoryview) -> Steer:
    """Raises as `decode`."""
    return _command_decoder.decode(data)


def decode(data: bytes | memoryview) -> Message:
    """Raises msgspec.DecodeError or msgspec.ValidationError on anything but a known message."""
    return _decoder.decode(data)


def int32(data: bytes) -> NDArray[np.int32]:
    return np.frombuffer(data, "<i4")


def float32(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f4")
