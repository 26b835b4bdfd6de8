"""The plain JSON answers, the page, and errors."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from neuroscope_vllm.core import launch, wire
from neuroscope_vllm.core.access import KeyDigests
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.engine.fake import FakeEngine, Script
from tests.server.side import Side, wait_until


def test_labels(side: Side, engine: FakeEngine):
    everything = side.get("/v1/features/labels").json()
    assert everything["total"] == 3
    assert everything["data"][1]["score"] == 0.5
    assert [one["index"] for one in side.get("/v1/features/labels?q=capital").json()["data"]] == [
        5,
        9,
    ]
    assert side.get("/v1/features/labels?index=7").json()["data"][0]["text"] == "rivers and lakes"
    assert side.get("/v1/features/labels?index=1").json() == {"data": [], "total": 0}
    page = side.get("/v1/features/labels?limit=1&offset=2&labeller=test").json()
    assert ([one["index"] for one in page["data"]], page["total"]) == ([9], 3)
    assert side.get("/v1/features/labels?layer=20").json()["total"] == 3
    assert side.get("/v1/features/labels?layer=12").json()["total"] == 0
    assert everything["data"][0] == {
        "layer": 20,
        "index": 5,
        "text": "capital cities",
        "labeller": "test",
        "score": None,
        "method": None,
        "model": None,
        "created": None,
        "examples": None,
        "author": None,
        "detection": None,
        "fuzzing": None,
        "scorer": None,
        "scored_on": None,
        "scoring": None,
        "positives": None,
        "negatives": None,
        "unreliable": False,
    }
    assert [one["unreliable"] for one in everything["data"]] == [False, True, False]
    both = side.get("/v1/features/labels?index=9&q=capital").json()
    assert [one["index"] for one in both["data"]] == [9]
    missing = side.get("/v1/features/labels?labeller=nobody")
    assert missing.status_code == 404
    assert "loaded: test" in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    "query",
    ["", '"', "OR", "*", "(", "NEAR(a", "text:x", "'; DROP TABLE found", "\0", "漢字", "^"],
)
def test_any_query_is_answered(side: Side, engine: FakeEngine, query: str):
    answer = side.get("/v1/features/labels", params={"q": query})
    assert (answer.status_code, answer.json()) == (200, {"data": [], "total": 0})


def test_searches_at_the_same_time_do_not_disturb_each_other(side: Side, engine: FakeEngine):
    def search(i: int) -> bool:
        word, found = [("capital", [5, 9]), ("river", [7]), ("letter", [9])][i % 3]
        answer = side.get("/v1/features/labels", params={"q": word}).json()
        return [one["index"] for one in answer["data"]] == found

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(search, range(60)))


def test_the_first_labeller_that_knows_a_feature_names_it(
    new_side: Callable[..., Side], tmp_path: Path
):
    scored = [
        Label(i, f"scored {i}", "scored", 0.9, examples=20, author="ann") for i in range(8192)
    ]
    tokens = [Label(i, f"tokens {i}", "tokens", 0.7 - 0.2 * (i < 2000)) for i in range(16384)]
    sae = tmp_path / "sae"
    LabelSet("scored", scored).save(sae / "labels" / "scored.jsonl")
    LabelSet("tokens", tokens).save(sae / "labels" / "tokens.jsonl")
    labels = launch.label_files(Settings(sae=[str(sae)]), [20])
    gone = tmp_path / "gone.jsonl"
    side = new_side(labels={20: [str(gone), *labels[20]]})  # removed since it was found
    with FakeEngine(side.endpoint, layers=(20,), top_k=4) as engine:
        side.wait_armed()
        engine.run("two", list(range(0, 520, 13)), [1])
        side.wait_done("two")
        events = [event for event in side.read("two") if event["event"] == "prompt"]
    features = [one for event in events for one in event["top_features"]]
    shown = {one["index"]: one["label"] for one in features}
    # That the other labeller's label of the same feature is unreliable is no one's business.
    assert not any("unreliable" in one for one in features)
    assert {index < 8192 for index in shown} == {True, False}
    for index, label in shown.items():
        assert label == (f"scored {index}" if index < 8192 else f"tokens {index}")
    found = side.get("/v1/features/labels?index=7").json()["data"]
    assert [(one["labeller"], one["examples"], one["author"]) for one in found] == [
        ("scored", 20, "ann"),
        ("tokens", None, None),
    ]
    assert side.get("/v1/features/labels?labeller=tokens&q=7").json()["total"] > 1000


def test_events_carry_labels(side: Side, engine: FakeEngine):
    # features_of(token, position, layer)[0] is token * 31 + position * 7 + layer, modulo the width.
    token = next(t for t in range(16384) if (t * 31 + 20) % 16384 == 7)
    engine.run("labelled", [token], [1])
    side.wait_done("labelled")
    prompt = side.read("labelled")[1]
    assert prompt["top_features"][0]["label"] == "rivers and lakes"
    assert prompt["top_features"][0]["unreliable"] is True  # it scored 0.5
    assert all("unreliable" not in feature for feature in prompt["top_features"][1:])
    assert prompt["sink"] is True


def test_describe(side: Side, engine: FakeEngine):
    body = side.get("/v1/features/describe").json()
    assert body["model"] == "fake"
    assert body["armed"] is True
    assert [site["layer"] for site in body["sites"]] == [20]
    assert body["sites"][0]["sae"]["width"] == 16384
    assert body["labellers"] == [{"labeller": "test", "layer": 20, "labels": 3, "coverage": 0.0002}]
    assert {sender["role"] for sender in body["senders"]} == {"worker", "scheduler"}
    assert {sender["host"] for sender in body["senders"]} == {socket.gethostname()}
    assert body["counters"]["messages"] > 0


def test_a_trace_holds_all_choices(side: Side, engine: FakeEngine):
    for choice in range(2):
        engine.run("chatcmpl-traced", [1, 2], [3], Script(choice=choice))
    choices = side.wait_done("traced", choices=2)
    assert [one["choice"] for one in choices] == [0, 1]
    assert [event["event"] for event in choices[0]["events"]] == [
        "request",
        "prompt",
        "prompt",
        "token",
        "done",
    ]
    recent = side.get("/v1/requests").json()
    assert {"chatcmpl-traced"} == {one["request_id"] for one in recent["data"][:2]}


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/v1/requests/none", 404, "not_found_error"),
        ("/nowhere", 404, "not_found_error"),
        ("/v1/features/labels?limit=0", 400, "invalid_request_error"),
        ("/v1/features/labels?limt=1", 400, "invalid_request_error"),
        ("/v1/chat/completions", 405, "invalid_request_error"),
    ],
)
def test_errors_have_openais_shape(side: Side, path: str, status: int, kind: str):
    answer = side.get(path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["type"] == kind


def test_docs_and_version(side: Side):
    assert side.get("/docs").status_code == 200
    paths = side.get("/openapi.json").json()["paths"]
    assert {"/v1/features/stream", "/v1/features/describe", "/health"} <= set(paths)
    assert side.get("/version").json()["wire_version"] == wire.WIRE_VERSION


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_served(host: str):
    launch.check_bind(Settings(features_host=host), KeyDigests())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_anything_else_is_refused(host: str):
    with pytest.raises(ConfigError, match="features_host is"):
        launch.check_bind(Settings(features_host=host), KeyDigests())
    launch.check_bind(Settings(features_host=host), KeyDigests(user=[b"digest"]))


def test_other_hosts_names_are_refused(side: Side):
    """A page elsewhere that rebinds its name to this address must not read the stream."""
    answer = side.get("/v1/requests", headers={"Host": "evil.example"})
    assert answer.status_code == 400


def test_a_name_that_two_requests_bear_steers_neither(side: Side, engine: FakeEngine):
    steps = Script(pause_s=0.3)
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(engine.run, "chatcmpl-shared", [1], list(range(8)), steps) for _ in range(2)
        ]
        running = wait_until(
            lambda: len(side.get("/v1/requests/shared").json().get("choices", [])) == 2
        )
        answer = side.put("/v1/requests/shared/steering", {"steer": []})
        assert running
        ids = [one.result() for one in both]
    assert answer.status_code == 409
    message = answer.json()["error"]["message"]
    assert "2 running requests are called 'shared'" in message
    assert all(internal_id in message for internal_id in ids)
