"""Columns of recorded events: a row an event, tokens and their features typed.

Whatever is no token, or would not come back from these columns byte for byte, has its JSON in
`json` instead. Without text, tokens have none there and no ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import msgspec
import pyarrow as pa

from neuroscope_vllm.core.config import Redact
from neuroscope_vllm.core.events import Feature, SteeredFeature, TokenEvent, encoder
from neuroscope_vllm.core.recording.record import (
    NO_ID,
    PLACEHOLDER,
    TOKENS,
    Head,
    RecordedEvent,
    RecordedTrace,
)

FEATURE = pa.struct(
    {
        "index": pa.int32(),
        "label": pa.string(),
        "activation": pa.float64(),  # shortest decimals of a float32, which a float32 is not
        "score": pa.float64(),
        "dense": pa.bool_(),
        "unreliable": pa.bool_(),
    }
)
STEERED = pa.struct({"index": pa.int32(), "before": pa.float64(), "after": pa.float64()})
SCHEMA = pa.schema(
    {
        "request_id": pa.string(),
        "internal_id": pa.string(),
        "choice": pa.int32(),
        "event": pa.string(),
        "epoch": pa.string(),
        "seq": pa.int64(),
        "time": pa.timestamp("us", tz="UTC"),
        "layer": pa.int32(),
        "position": pa.int32(),
        "token_index": pa.int32(),
        "token": pa.string(),
        "token_id": pa.int32(),
        "l0": pa.int32(),
        "features_at": pa.string(),
        "cached": pa.bool_(),
        "sink": pa.bool_(),
        "top_features": pa.list_(FEATURE),
        "steered": pa.list_(STEERED),
        "json": pa.string(),
    }
)
_PHASES = {"prompt": "prompt", "token": None}

_decoder = msgspec.json.Decoder(TokenEvent)


def to_batch(head: Head, events: Sequence[RecordedEvent], redact: Redact) -> pa.RecordBatch:
    """Rows of some events of a trace, in SCHEMA."""
    hidden = redact == "text"
    rows: list[tuple[Any, ...]] = []
    tops: list[list[Feature]] = []
    steered: list[list[SteeredFeature]] = []
    for event in events:
        token = _token(head, event) if event.name in TOKENS else None
        rows.append(_row(head, event, token, hidden))
        tops.append(token.top_features if token else [])
        steered.append(token.steered if token else [])
    columns = dict(zip(_PLAIN, zip(*rows, strict=True), strict=True))
    arrays: dict[str, pa.Array] = {
        name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()
    }
    arrays["top_features"] = _lists(tops, FEATURE)
    arrays["steered"] = _lists(steered, STEERED)
    return pa.RecordBatch.from_arrays([arrays[name] for name in SCHEMA.names], schema=SCHEMA)


_PLAIN = [name for name in SCHEMA.names if name not in ("top_features", "steered")]


def _row(
    head: Head, event: RecordedEvent, token: TokenEvent | None, hidden: bool
) -> tuple[Any, ...]:
    """In the order of _PLAIN."""
    time = None if event.time is None else round(event.time * 1e6)
    start = (head.request_id, head.internal_id, head.choice, event.name, event.epoch, event.seq)
    if token is None:
        return (*start, time, event.layer, *(None,) * 8, _json(event, hidden))
    text, token_id = (None, None) if hidden else (token.token, token.token_id)
    return (
        *start, time, event.layer, token.position, token.token_index, text, token_id, token.l0,
        token.features_at, token.cached, token.sink, None,
    )  # fmt: skip


def _json(event: RecordedEvent, hidden: bool) -> str:
    if not hidden or event.name not in TOKENS:
        return event.json.decode()
    fields = msgspec.json.decode(event.json, type=dict)
    return encoder.encode({**fields, "token": PLACEHOLDER, "token_id": NO_ID}).decode()


def _token(head: Head, event: RecordedEvent) -> TokenEvent | None:
    """The event, if the columns hold all of it."""
    try:
        token = _decoder.decode(event.json)
    except msgspec.MsgspecError:
        return None
    whose = (token.request_id, token.internal_id, token.choice, token.layer, token.phase)
    told = (head.request_id, head.internal_id, head.choice, event.layer, _PHASES[event.name])
    return token if whose == told and encoder.encode(token) == event.json else None


def _lists(values: Sequence[Sequence[Any]], of: pa.StructType) -> pa.Array:
    """A list of structs a row."""
    ends = [0, *accumulate(map(len, values))]
    flat = [one for some in values for one in some]
    columns = [pa.array([getattr(one, field.name) for one in flat], field.type) for field in of]
    structs = pa.StructArray.from_arrays(columns, fields=list(of))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), structs, type=pa.list_(of))


CHUNK = 128
"""Events that are converted at a time."""


def chunks(events: Sequence[RecordedEvent]) -> Iterator[Sequence[RecordedEvent]]:
    for start in range(0, len(events), CHUNK):
        yield events[start : start + CHUNK]


def to_batches(traces: Iterable[RecordedTrace], redact: Redact) -> list[pa.RecordBatch]:
    """Rows of whole traces, one after another."""
    return [to_batch(head, some, redact) for head, events in traces for some in chunks(events)]


def to_events(table: pa.Table) -> list[RecordedEvent]:
    """Rows of one choice, as they were told; where texts were left out, with placeholders."""
    columns: dict[str, list[Any]] = {
        name: table[name].to_pylist() for name in _PLAIN if name != "time"
    }
    columns["time"] = table["time"].cast(pa.int64()).to_pylist()
    tops = _structs(table["top_features"], Feature)
    steered = _structs(table["steered"], SteeredFeature)
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [_event(*row) for row in zip(rows, tops, steered, strict=True)]


def _structs(column: pa.ChunkedArray, of: type[Any]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for chunk in column.chunks:
        flat = chunk.flatten()
        values = [flat.field(name).to_pylist() for name in of.__struct_fields__]
        made = iter([of(*row) for row in zip(*values, strict=True)])
        found += [[next(made) for _ in range(n)] for n in chunk.value_lengths().to_pylist()]
    return found


def _event(row: dict[str, Any], top: list[Feature], steered: list[SteeredFeature]) -> RecordedEvent:
    if row["json"] is not None:
        json = row["json"].encode()
    else:
        hidden = row["token"] is None
        token = TokenEvent(
            row["request_id"], row["choice"], row["token_index"], row["position"],
            PLACEHOLDER if hidden else row["token"], NO_ID if hidden else row["token_id"],
            row["layer"], top, row["l0"], row["features_at"], _PHASES[row["event"]], row["cached"],
            row["sink"], row["internal_id"], steered,
        )  # fmt: skip
        json = encoder.encode(token)
    time = None if row["time"] is None else row["time"] / 1e6
    return RecordedEvent(row["event"], row["layer"], row["epoch"], row["seq"], time, json)
