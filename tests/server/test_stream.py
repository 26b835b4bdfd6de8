"""The stream as readers see it: before, during and after a request, resumed, and in each format."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from neuroscope_vllm.core import wire
from neuroscope_vllm.engine.fake import DENSE, FakeEngine, Script, features_of, l0_of
from neuroscope_vllm.server.rows import unpack_layer
from tests.server.side import Side, wait_until

PROMPT = list(b"The sea: ")
TEXT = "salt 🌊 and wind"


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def tokens(events: list[dict[str, Any]], name: str = "token") -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def check_whole(events: list[dict[str, Any]], prompt: list[int], output: list[int]) -> None:
    """Everything of one choice, once, in order, with the features of its own position."""
    assert names(events) == ["request"] + ["prompt"] * len(prompt) + ["token"] * len(output) + [
        "done"
    ]
    placed = events[1:-1]
    assert [event["position"] for event in placed] == list(range(len(placed)))
    assert [event["token_id"] for event in placed] == prompt + output
    for event in placed[:-1]:
        wanted = features_of(event["token_id"], event["position"], 20, 4)
        got = [(f["index"], f["activation"]) for f in event["top_features"]]
        assert [index for index, _ in got] == [index for index, _ in wanted]
        assert [value for _, value in got] == pytest.approx([value for _, value in wanted])
        assert event["l0"] == l0_of(event["token_id"])
    seqs = [int(event["id"].rpartition("-")[2]) for event in events]
    assert seqs == sorted(set(seqs))


def test_a_token_event_is_the_seeds_json(side: Side, engine: FakeEngine):
    engine.run("chatcmpl-seed", [10, 11], [5, 6])
    side.wait_done("seed")
    event = tokens(side.read("seed"))[0]
    del event["event"], event["id"]
    features = features_of(5, 2, 20, 4)
    assert list(event) == [
        "request_id", "choice", "token_index", "position", "token", "token_id", "layer",
        "top_features", "l0", "features_at", "internal_id",
    ]  # fmt: skip
    assert event | {"top_features": None} == {
        "request_id": "chatcmpl-seed", "choice": 0, "token_index": 0, "position": 2, "token": "&",
        "token_id": 5, "layer": 20, "top_features": None, "l0": 25, "features_at": "self",
        "internal_id": event["internal_id"],
    }  # fmt: skip
    assert event["top_features"][0] == {
        "index": features[0][0],
        "label": None,
        "activation": features[0][1],
        "score": features[0][1] / 2,
    }


def test_floats_are_the_shortest_that_name_the_float32(side: Side, engine: FakeEngine):
    engine.run("floats", [10], [5, 6])
    side.wait_done("floats")
    raw = side.get("/v1/requests/floats").text
    # A third of 100/1, as float32, is 33.333332; as a double of it, 33.33333206176758.
    values = [
        f["activation"]
        for e in json.loads(raw)["choices"][0]["events"]
        for f in e.get("top_features", [])
    ]
    assert values
    assert all(len(repr(value)) <= 10 for value in values)


def test_floats_of_a_large_step_are_the_same_as_numpy_prints():
    bits = np.random.default_rng(0).integers(0, 2**32, 16_000, np.uint64).astype(np.uint32)
    drawn = bits.view(np.float32)
    usual = np.random.default_rng(1).exponential(20, 16_000).astype(np.float32)
    corners = [0, -0.0, np.inf, 1e6, 999999.9, 1e-12, 3.82, 0.1, 2**-5, 2**20, 16777216, 1e38]
    values = np.concatenate([drawn[np.isfinite(drawn)], usual, np.float32(corners)])
    rows, flat = len(values), values.tobytes()
    column = np.zeros(rows, "<i4").tobytes()
    layer = wire.LayerFeatures(20, 1, column, flat, flat, column, bytes(rows))
    printed = [value for row in unpack_layer(layer, rows) for value in row.activation]
    assert printed == [float(str(v)) for v in values]


@pytest.mark.parametrize("name", ["chatcmpl-after", "after", "internal"])
def test_subscribing_after_replays_and_ends(side: Side, engine: FakeEngine, name: str):
    internal = engine.run(f"chatcmpl-after-{name}", PROMPT, [1, 2, 3])
    side.wait_done(internal)
    asked = {
        "chatcmpl-after": f"chatcmpl-after-{name}",
        "after": f"after-{name}",
        "internal": internal,
    }
    check_whole(side.read(asked[name]), PROMPT, [1, 2, 3])


def test_subscribing_before_waits(side: Side, engine: FakeEngine):
    with side.open("early") as events:
        engine.run("chatcmpl-early", PROMPT, [1, 2, 3])
        check_whole(list(events), PROMPT, [1, 2, 3])


def test_subscribing_during_replays_then_goes_live(side: Side, engine: FakeEngine):
    output = [n % 250 for n in range(120)]
    running = threading.Thread(
        target=engine.run, args=("chatcmpl-mid", PROMPT, output, Script(pause_s=0.005))
    )
    running.start()
    wait_until(lambda: side.get("/v1/requests/mid").status_code == 200)
    with ThreadPoolExecutor(8) as pool:
        for events in pool.map(lambda _: side.read("mid"), range(8)):
            check_whole(events, PROMPT, output)
    running.join()


def test_tokens_joined_are_the_text(side: Side, engine: FakeEngine, tokenizer: Tokenizer):
    output = ids_of(tokenizer, TEXT)
    engine.run("text", PROMPT, [*output, 256], Script(finish_reason="stop"))
    side.wait_done("text")
    events = side.read("text")
    texts = [event["token"] for event in tokens(events)]
    assert "".join(texts) == TEXT
    at = texts.index("🌊")
    assert texts[at - 3 : at] == ["", "", ""]
    assert events[-1]["finish_reason"] == "stop"
    assert events[-1]["completion_tokens"] == len(output) + 1


def test_last_token_has_no_features_even_if_it_ran(side: Side, engine: FakeEngine):
    for first in (False, True):
        name = f"last-{first}"
        engine.run(name, PROMPT, [1, 2], Script(features_first=first))
        side.wait_done(name)
        last = tokens(side.read(name))[-1]
        assert (last["features_at"], last["top_features"], last["l0"]) == (None, [], None)


def test_stop_string_is_cut_as_vllm_cuts_it(side: Side, engine: FakeEngine, tokenizer: Tokenizer):
    output = ids_of(tokenizer, "one two END three")
    script = Script(stop=(" END", "never"), abort=True)
    engine.run("stops", PROMPT, output, script)
    side.wait_done("stops")
    events = side.read("stops")
    assert "".join(event["token"] for event in tokens(events)) == "one two"
    done = events[-1]
    assert (done["finish_reason"], done["completion_tokens"]) == ("stop", len("one two END"))


@pytest.mark.parametrize(
    "script",
    [
        Script(chunk=2),
        Script(drafts=3),
        Script(drafts=2, features_first=True, chunk=3),
        Script(preempt_at=2),
        Script(features_first=True),
    ],
    ids=["chunked", "drafts", "drafts-first", "preempted", "features-first"],
)
def test_whatever_the_engine_does_the_story_is_the_same(
    side: Side, engine: FakeEngine, script: Script, request: pytest.FixtureRequest
):
    name = request.node.callspec.id
    engine.run(name, PROMPT, [1, 2, 3, 4, 5], script)
    side.wait_done(name)
    check_whole(side.read(name), PROMPT, [1, 2, 3, 4, 5])


def test_cached_prompt_tokens_are_said_to_be_cached(side: Side, engine: FakeEngine):
    engine.run("cached", PROMPT, [1, 2], Script(cached=4))
    side.wait_done("cached")
    events = side.read("cached")
    prompt = tokens(events, "prompt")
    assert [event.get("cached", False) for event in prompt] == [True] * 4 + [False] * 5
    assert all(event["top_features"] == [] and event["l0"] is None for event in prompt[:4])
    assert events[-1]["cached_tokens"] == 4
    assert events[-1]["dropped"] == 0


def test_lost_features_are_a_gap(side: Side, engine: FakeEngine):
    engine.run("lost", PROMPT, [1, 2, 3, 4], Script(lost=frozenset({10, 11})))
    side.wait_done("lost")
    events = side.read("lost")
    [gap] = tokens(events, "gap")
    assert gap == {"event": "gap", "id": gap["id"]} | {
        "reason": "dropped",
        "request_id": "lost",
        "choice": 0,
        "from": 10,
        "to": 12,
        "count": 2,
        "internal_id": gap["internal_id"],
    }
    assert [event["position"] for event in tokens(events)] == [9, 10, 11, 12]
    assert events[-1]["dropped"] == 2


def test_all_choices_of_a_request_come_on_one_stream(side: Side, engine: FakeEngine):
    def run(choice: int) -> None:
        engine.run("chatcmpl-many", PROMPT, [choice, 2, 3], Script(choice=choice, pause_s=0.01))

    with side.open("many") as events, ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
        received = list(events)
    assert {event["choice"] for event in tokens(received, "done")} == {0, 1, 2}
    for choice in range(3):
        check_whole([e for e in received if e["choice"] == choice], PROMPT, [choice, 2, 3])


def test_two_requests_of_one_id_both_come_and_others_do_not(side: Side, engine: FakeEngine):
    first, second = engine.run("twice", PROMPT, [1]), engine.run("twice", PROMPT, [2])
    engine.run("twice-not", PROMPT, [3])
    side.wait_done("twice", choices=2)
    side.wait_done("twice-not")
    events = side.read("twice")
    assert [e["internal_id"] for e in tokens(events, "request")] == [first, second]
    assert {e["token_id"] for e in tokens(events)} == {1, 2}
    assert [e["internal_id"] for e in tokens(side.read(second), "request")] == [second]


def test_the_stream_of_all_requests_starts_now(side: Side, engine: FakeEngine):
    engine.run("all-past", PROMPT, [1])
    side.wait_done("all-past")
    with side.open() as events:
        engine.run("all-a", PROMPT, [1, 2])
        engine.run("all-b", PROMPT, [3])
        received: list[dict[str, Any]] = []
        for event in events:
            received.append(event)
            if {"all-a", "all-b"} <= {e["request_id"] for e in tokens(received, "done")}:
                break
    # Another test's may still run.
    assert "all-past" not in {event["request_id"] for event in received}
    assert [e["token_id"] for e in tokens(received) if e["request_id"] == "all-a"] == [1, 2]


def test_resuming_goes_on_after_the_last_event(side: Side, engine: FakeEngine):
    engine.run("resumed", PROMPT, [1, 2, 3])
    side.wait_done("resumed")
    whole = side.read("resumed")
    for resume in (
        {"headers": {"Last-Event-ID": whole[6]["id"]}},
        {"last_event_id": whole[6]["id"]},
    ):
        assert side.read("resumed", **resume) == whole[7:]


def test_resuming_the_stream_of_all_requests(side: Side, engine: FakeEngine):
    engine.run("again", PROMPT, [1, 2, 3])
    side.wait_done("again")
    whole = side.read("again")
    with side.open(headers={"Last-Event-ID": whole[0]["id"]}) as events:
        # Other tests' requests may still run.
        told = (event for event in events if event["request_id"] == "again")
        assert [next(told) for _ in whole[1:]] == whole[1:]


def test_nothing_left_to_resume_is_204(side: Side, engine: FakeEngine):
    engine.run("over", PROMPT, [1])
    side.wait_done("over")
    last = side.read("over")[-1]["id"]
    for name in ("over", "never-seen"):
        answer = side.get(
            "/v1/features/stream", params={"request_id": name}, headers={"Last-Event-ID": last}
        )
        assert answer.status_code == 204


def test_another_epoch_is_a_gap_then_everything(side: Side, engine: FakeEngine):
    engine.run("epoch", PROMPT, [1])
    side.wait_done("epoch")
    events = side.read("epoch", last_event_id="feedbeef-12")
    assert (events[0]["event"], events[0]["reason"]) == ("gap", "restarted")
    check_whole(events[1:], PROMPT, [1])


def test_ndjson(side: Side, engine: FakeEngine):
    engine.run("lines", PROMPT, [1, 2])
    side.wait_done("lines")
    answer = side.get(
        "/v1/features/stream?request_id=lines", headers={"Accept": "application/x-ndjson"}
    )
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    check_whole([json.loads(line) for line in answer.text.splitlines()], PROMPT, [1, 2])


def test_openai_format(side: Side, engine: FakeEngine):
    engine.run("oai", PROMPT, [1, 2])
    side.wait_done("oai")
    lines = [
        x
        for x in side.get("/v1/features/stream?request_id=oai&format=openai").text.split("\n")
        if x
    ]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    check_whole([json.loads(line[6:]) for line in lines[:-1]], PROMPT, [1, 2])


def test_sse_frames(side: Side, engine: FakeEngine):
    engine.run("frames", PROMPT, [1])
    side.wait_done("frames")
    answer = side.get("/v1/features/stream?request_id=frames")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.text.startswith("retry: 3000\n\nid: ")


def test_dense_features_are_tagged_and_have_a_view_of_their_own(side: Side, engine: FakeEngine):
    engine.run("tagged", [5, 6, 7], [8, 9])
    told, alone, others = (
        tokens(side.read("tagged", **query)) for query in ({}, {"dense": True}, {"dense": False})
    )
    tags = [f.get("dense", False) for e in told for f in e["top_features"]]
    assert tags == [f["index"] in DENSE for e in told for f in e["top_features"]]
    assert any(tags)
    assert not all(tags)
    for every, dense, rest in zip(told, alone, others, strict=True):
        assert dense["top_features"] == [f for f in every["top_features"] if f.get("dense")]
        assert rest["top_features"] == [f for f in every["top_features"] if not f.get("dense")]


def test_include_top_k_and_predict(side: Side, engine: FakeEngine):
    engine.run("viewed", PROMPT, [1, 2, 3])
    side.wait_done("viewed")
    whole = side.read("viewed")
    assert names(side.read("viewed", include="token")) == [
        "request",
        "token",
        "token",
        "token",
        "done",
    ]
    assert all(len(e["top_features"]) <= 2 for e in tokens(side.read("viewed", top_k=2)))
    shifted = side.read("viewed", align="predict", top_k=1)
    assert (shifted[1]["features_at"], shifted[1]["top_features"]) == (None, [])
    for before, event in zip(whole[1:-2], shifted[2:-1], strict=True):
        assert event["features_at"] == "previous"
        assert event["top_features"] == before["top_features"][:1]
        assert event["l0"] == before["l0"]


def test_many_readers_each_get_everything(side: Side, engine: FakeEngine):
    output = [n % 250 for n in range(40)]
    readers = 200
    with ThreadPoolExecutor(readers) as pool:
        waiting = [pool.submit(side.read, "crowd") for _ in range(readers)]
        wait_until(lambda: _readers(side) >= readers, timeout=20)
        engine.run("crowd", PROMPT, output, Script(pause_s=0.005))
        for reader in waiting:
            check_whole(reader.result(30), PROMPT, output)
    wait_until(lambda: _readers(side) == 0)


def _readers(side: Side) -> int:
    return side.get("/v1/features/describe").json()["limits"]["readers"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("nonsense=1", "nonsense"),
        ("top_k=0", "top_k"),
        ("top_k=99", "top_k"),
        ("layer=3", "layer"),
        ("layer=x", "layer"),
        ("include=prompt,dreams", "include"),
        ("align=sideways", "align"),
        ("format=xml", "format"),
        ("last_event_id=abc", "last_event_id"),
    ],
)
def test_bad_parameters_are_refused(side: Side, engine: FakeEngine, query: str, param: str):
    answer = side.get(f"/v1/features/stream?{query}")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_readers_that_leave_are_forgotten(side: Side, engine: FakeEngine):
    with httpx.stream("GET", side.stream_url, params={"request_id": "gone"}) as response:
        assert response.status_code == 200
        wait_until(lambda: _readers(side) == 1)
    wait_until(lambda: _readers(side) == 0)
