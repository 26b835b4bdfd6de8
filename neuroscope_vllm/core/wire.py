"""Messages from the engine to the hub, and their encoding. Torch-free.

Two kinds of sender live in an engine. The *scheduler* knows the truth about tokens: which
requests exist, what was sampled, what stands after stops and rejected drafts. The *worker*
knows the features of the rows it ran. The hub joins the two by (internal_id, position), so a
worker never has to know about speculation, preemption or an extra forward after EOS.

Encoding is msgpack through msgspec, typed on both ends; arrays travel as little-endian bytes.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from neuroscope_vllm.core.sae.info import SAEInfo

WIRE_VERSION = 2


class Site(msgspec.Struct, frozen=True):
    """One observed layer and what reads it."""

    layer: int
    sae: SAEInfo
    ranking: str
    top_k: int
    sink_norm: float | None
    """Rows with a larger residual L2 norm are attention sinks; None without calibration."""


class Hello(msgspec.Struct, tag="hello"):
    """Sent by every sender on connect and then once a second, so that a restarted hub learns all.

    `counters` are totals since the sender started, e.g. rows_observed, rows_encoded,
    messages_dropped.
    """

    sender: str
    role: str  # "worker" | "scheduler"
    dp_rank: int
    model: str
    wire_version: int = WIRE_VERSION
    armed: bool = False
    runner: str = ""  # "v1" | "v2", workers only
    cudagraph_mode: str = ""  # vLLM's name, e.g. "FULL_AND_PIECEWISE"; "NONE" when off
    sites: list[Site] = []
    warnings: list[str] = []
    counters: dict[str, int] = {}


class RequestStarted(msgspec.Struct, tag="request"):
    """A choice of a request was admitted by the scheduler. One message per internal id."""

    internal_id: str
    request_id: str  # as the client sees it, e.g. "chatcmpl-abc"
    choice: int
    dp_rank: int
    prompt_token_ids: bytes  # int32[prompt_len]
    created: float  # unix seconds
    stop: list[str] = []
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    lora: str | None = None


class Sampled(msgspec.Struct):
    """Tokens of one choice that stand, in order, after a step."""

    internal_id: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error" | "repetition"
    stop_reason: int | str | None = None  # the stop token or string, as vLLM reports it
    at: int | None = None
    """Tokens generated before these; tells a hub that it missed some, or has them already."""


class TokensSampled(msgspec.Struct, tag="tokens"):
    """Everything the scheduler accepted in one step. Aborts come as a Sampled without tokens."""

    dp_rank: int
    sampled: list[Sampled]


class Live(msgspec.Struct):
    """A choice that runs, and its tokens so far."""

    started: RequestStarted
    token_ids: list[int]


class Resync(msgspec.Struct, tag="resync"):
    """All that runs on one scheduler; sent when messages were lost or the hub is a new one."""

    dp_rank: int
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


class StepFeatures(msgspec.Struct, tag="features"):
    """Features of every row of one forward pass. Rows may turn out not to stand."""

    dp_rank: int
    spans: list[Span]
    positions: bytes  # int32[n], absolute in the request's context
    token_ids: bytes  # int32[n], the input token of each row
    layers: list[LayerFeatures]


class Goodbye(msgspec.Struct, tag="goodbye"):
    """The sender shuts down in good order."""

    sender: str


Message = Hello | RequestStarted | TokensSampled | Resync | StepFeatures | Goodbye

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Raises msgspec.DecodeError or msgspec.ValidationError on anything but a known message."""
    return _decoder.decode(data)


def int32(data: bytes) -> NDArray[np.int32]:
    return np.frombuffer(data, "<i4")


def float32(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f4")
