"""Recordings on disk: every event comes back byte for byte, whatever it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroscope_vllm.core.config import Redact, resolve
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.events import (
    DoneEvent,
    ErrorBody,
    ErrorEvent,
    Feature,
    GapEvent,
    RequestEvent,
    RuleEvent,
    SteeredFeature,
    SteeringEvent,
    TokenEvent,
    encoder,
)
from neuroscope_vllm.core.recording.files import (
    METADATA,
    Recording,
    read_traces,
    to_file,
    write_traces,
)
from neuroscope_vllm.core.recording.record import Head, RecordedEvent, RecordedTrace, of_answer
from neuroscope_vllm.core.recording.rows import SCHEMA, to_batch, to_events
from neuroscope_vllm.core.recording.timeline import timeline
from tests.support.recorded import about, make_trace, write_recorded

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
INT = st.integers(0, 2**31 - 1)
FEATURES = st.lists(
    st.builds(Feature, INT, st.none() | TEXT, FLOAT, FLOAT, st.booleans(), st.booleans())
)
TOKEN = st.builds(
    TokenEvent,
    st.just("chatcmpl-r"),
    st.just(1),
    st.none() | INT,
    INT,
    TEXT,
    INT,
    st.none() | INT,
    FEATURES,
    st.none() | INT,
    st.sampled_from([None, "self"]),
    st.sampled_from([None, "prompt"]),
    st.booleans(),
    st.booleans(),
    st.just("i"),
    st.lists(st.builds(SteeredFeature, INT, FLOAT, FLOAT), max_size=2),
)
OTHERS: list[tuple[str, Any]] = [
    ("request", RequestEvent("r", "i", 1, "m", 3, 1.5, [5], 0, steering={"edits": ["🦊"]})),
    ("rule", RuleEvent("r", 1, 3, "rule", 5, 7, 2.5, "label\u2028", "tag", True, "i")),
    ("steering", SteeringEvent("r", 1, 3, None, "i")),
    ("gap", GapEvent("dropped", "r", 1, 3, 4, 1, "i")),
    ("error", ErrorEvent("r", 1, ErrorBody("gone", "server_error"), "i")),
    ("done", DoneEvent("r", 1, "stop", 3, 4, 0, 0, "i")),
]


def head(events: int) -> Head:
    return Head(
        request_id="chatcmpl-r",
        internal_id="i",
        choice=1,
        epoch="abc",
        created=1.5,
        events_total=events,
        events=events,
    )


def there_and_back(told: list[tuple[str, Any]], redact: Redact = "none") -> list[RecordedEvent]:
    events = [
        RecordedEvent(name, getattr(event, "layer", None), "abc", n, n / 8, encoder.encode(event))
        for n, (name, event) in enumerate(told)
    ]
    table = pa.Table.from_batches([to_batch(head(len(told)), events, redact)])
    back = to_events(table)
    assert [one.id for one in back] == [one.id for one in events]
    if redact == "none":
        assert back == events
    return back


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKEN, min_size=1, max_size=5))
def test_tokens_come_back_byte_for_byte(tokens: list[TokenEvent]) -> None:
    told = [("prompt" if token.phase else "token", token) for token in tokens]
    there_and_back([*told, *OTHERS])
    for event in there_and_back(told, "text"):
        assert b'"token":"\xe2\x96\xae ","token_id":-1,' in event.json


def test_tokens_that_fit_no_column_come_back_too() -> None:
    def token(**changes: Any) -> dict[str, Any]:
        plain = {"request_id": "chatcmpl-r", "choice": 1, "token_index": 0, "position": 4}
        plain |= {"token": "secret", "token_id": 3, "layer": 5, "top_features": [], "l0": 3}
        return plain | {"features_at": "self", "internal_id": "i"} | changes

    odd = [
        token(),
        token(new_field=1),
        token(request_id="another"),
        token(features_at="previous"),
        token(top_features=[{"index": 1, "label": None, "activation": None, "score": 1.0}]),
    ]
    events = [
        RecordedEvent("token", 5, "abc", n, None, encoder.encode(one)) for n, one in enumerate(odd)
    ]
    table = pa.Table.from_batches([to_batch(head(len(odd)), events, "none")])
    assert to_events(table) == events
    hidden = to_events(pa.Table.from_batches([to_batch(head(len(odd)), events, "text")]))
    assert not any(b"secret" in one.json for one in hidden)
    huge = RecordedEvent("token", 5, "abc", 0, None, encoder.encode(token(token_id=2**40)))
    with pytest.raises(ConfigError, match="JSON lines hold it"):
        to_file(about(), [RecordedTrace(head(1), [huge])])


def test_long_traces_and_many_share_files(tmp_path: Path) -> None:
    """More events than are read at once, and traces that begin in the middle of that."""
    traces = [
        make_trace(tokens, request_id=f"chatcmpl-{n}", layers=(5, 20), seq=n * 100_000)
        for n, tokens in enumerate((60, 9000, 61, 62))
    ]
    write_traces(tmp_path, about((5, 20)), traces[:3])
    write_traces(tmp_path, about((5, 20)), traces[3:])
    assert [*read_traces(tmp_path)] == traces
    assert [*read_traces(tmp_path, "2")] == [traces[2]]
    assert [*read_traces(tmp_path, "chatcmpl-1-00c0ffee")] == [traces[1]]
    assert [*read_traces(tmp_path, "nobody")] == []
    recording = Recording(tmp_path)
    told = [*timeline(recording, recording.places)]
    assert [one.due for one in told] == sorted(one.due for one in told)
    for n, trace in enumerate(traces):
        assert [one.event for one in told if one.trace == n] == trace.events


def test_an_answer_is_a_trace() -> None:
    trace = make_trace(50)
    ((back, finished),) = of_answer(b'{"choices":[%b]}' % trace.json)
    assert finished
    assert back.json == trace.json
    assert all(event.time is None for event in back.events)
    part = RecordedTrace(trace.head, trace.events).json.replace(
        b'"finished":true', b'"finished":false'
    )
    assert of_answer(b'{"choices":[%b]}' % part)[0][1] is False
    with pytest.raises(ValueError, match="not in the form"):
        of_answer(b'{"choices":[%b]}' % trace.json.replace(b'"event":"token"', b'"event": "token"'))


def test_other_parquet_is_left_alone_and_newer_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match="holds no recording"):
        Recording(tmp_path)
    write_recorded(tmp_path, 20, prompt=5)
    assert len(Recording(tmp_path).places) == 1
    schema = SCHEMA.with_metadata({METADATA: b'{"version": 2}'})
    pq.write_table(schema.empty_table(), tmp_path / "newer.parquet")
    with pytest.raises(ConfigError, match="version 2"):
        Recording(tmp_path)


def test_a_file_that_is_gone_is_said(tmp_path: Path) -> None:
    write_recorded(tmp_path, 20, prompt=5)
    recording = Recording(tmp_path)
    recording.places[0].file.unlink()
    with pytest.raises(ConfigError, match="can not be read"):
        recording.read(recording.places[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"record_rate": 0}, "above 0"),
        ({"record_rate": 1.5}, "at most 1"),
        ({"record_rate": "nan"}, "record_rate is nan"),
        ({"record_days": -1}, "record_days is -1"),
        ({"record_redact": "tokens"}, "record_redact"),
    ],
)
def test_settings_that_can_not_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"sae": "x", "record": "there", **given}, {})


def test_a_damaged_file_tells_nothing_wrong(tmp_path: Path) -> None:
    """Each bit of it that flips is noticed, or is of no account."""
    trace = write_recorded(tmp_path / "kept", 60)
    [file] = (tmp_path / "kept").glob("*/*.parquet")
    content = file.read_bytes()
    noticed = 0
    for at in range(4, len(content), 97):
        file.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        try:
            found = list(read_traces(tmp_path / "kept", "recorded"))
        except ConfigError as error:
            noticed += "can not be read" in str(error) or "holds no recording" in str(error)
        else:
            assert [event.json for one in found for event in one.events] == [
                event.json for event in trace.events
            ] or not found, at
    assert noticed > 20
