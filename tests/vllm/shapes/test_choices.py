"""Requests of several choices, and requests of any name: each choice finds itself."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.support.served import sse_events
from tests.vllm.shapes.asking import CHAT, COMPLETION, PREFIX, Answer, Api, new_name, some_tokens

REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 24},
    COMPLETION: {"prompt": "Paris is the capital", "max_tokens": 24},
}

both_paths = pytest.mark.parametrize("path", [CHAT, COMPLETION])
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@streamed_or_not
@both_paths
def test_choices_of_one_prompt(api: Api, path: str, stream: bool) -> None:
    answer = api.ask(path, {**REQUESTS[path], "n": 3}, stream=stream)
    assert len(answer.choices) == 3
    assert len({tuple(choice.tokens) for choice in answer.choices.values()}) == 3
    api.check(answer)


@streamed_or_not
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "prompts",
    [["Paris", "The quick brown fox", "What"], [[70, 71, 72], [300, 8], [9] * 70]],
    ids=["texts", "tokens"],
)
def test_choices_of_several_prompts(api: Api, prompts: Any, n: int, stream: bool) -> None:
    body = {"prompt": prompts, "n": n, "max_tokens": 9, "ignore_eos": True}
    answer = api.ask(COMPLETION, body, stream=stream)
    assert len(answer.choices) == 3 * n
    assert len({tuple(choice.prompt) for choice in answer.choices.values()}) == 3
    api.check(answer)


def test_a_name_like_a_choice_of_another(api: Api) -> None:
    """Clients may end their ids as vLLM ends those of prompts, turns and beams."""
    base = new_name()
    for name in (f"{base}-1", f"{base}_1", f"1_{base}", f"{base}-beam-1", f"{base}-0123abcd"):
        for path, body in REQUESTS.items():
            answer = api.ask(path, body, name=name)
            assert answer.id == PREFIX[path] + name
            api.check(answer)
            assert httpx.get(f"{api.served.features}/v1/requests/{base}").status_code == 404


@both_paths
@pytest.mark.parametrize("name", ["", "a/b?c=d&e#f%20", "ü é", "x" * 500, "[{}]", "0"])
def test_any_name(api: Api, path: str, name: str) -> None:
    """Whatever a client sends as X-Request-Id, the answer's id finds the trace."""
    name += new_name() if name else ""
    body = {**REQUESTS[path], "max_tokens": 3, "return_token_ids": True, "model": "tiny"}
    headers = {b"X-Request-Id": name.encode()}
    said = httpx.post(api.served.chat + path, json=body, headers=headers, timeout=60).json()
    url = f"{api.served.features}/v1/requests/{quote(said['id'], safe='')}"
    deadline = time.monotonic() + 10
    while (trace := httpx.get(url).json()).get("choices", [{}])[-1].get("finished") is not True:
        assert time.monotonic() < deadline, trace
        time.sleep(0.05)
    events = trace["choices"][-1]["events"]
    tokens = [e["token_id"] for e in events if e["event"] == "token"]
    assert tokens == said["choices"][0]["token_ids"]
    assert {e["request_id"] for e in events} == {said["id"]}


def test_the_stream_of_one_request_has_all_its_choices(api: Api) -> None:
    """A reader that waits for the X-Request-Id gets what the trace keeps, and an end."""
    name = new_name()
    url = f"{api.served.features}/v1/features/stream"
    events: list[dict[str, Any]] = []

    def read() -> None:
        with httpx.stream("GET", url, params={"request_id": name}, timeout=60) as response:
            connected.set()
            events.extend(sse_events(response))

    connected = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    assert connected.wait(10)
    body = {"prompt": ["Paris", "The quick"], "n": 2, "max_tokens": 12}
    told = api.check(api.ask(COMPLETION, body, name=name))
    reader.join(20)
    assert not reader.is_alive()
    for choice, expected in enumerate(told):
        got = [e for e in events if e["choice"] == choice]
        assert got == expected


@both_paths
@pytest.mark.parametrize("width", [2, 3])
def test_beam_search(api: Api, path: str, width: int) -> None:
    body = {**REQUESTS[path], "use_beam_search": True, "n": width, "max_tokens": 5}
    answer = api.ask(path, {**body, "temperature": 0})
    assert len(answer.choices) == width
    prompt = answer.choices[0].prompt
    steps = max(len(choice.tokens) for choice in answer.choices.values())
    found = api.served.trace(answer.id, 1 + (steps - 1) * width)
    contexts = set()
    for one in found:
        events = one["events"]
        context = [e["token_id"] for e in events if e["event"] in ("prompt", "token")]
        assert events[0]["beam"] is True
        assert one["choice"] in range(width)
        assert context[: len(prompt)] == prompt
        api.check_events(events, answer.id, one["choice"], context)
        contexts.add(tuple(context[:-1]))
    for choice in answer.choices.values():
        for length in range(len(choice.tokens)):
            assert (*prompt, *choice.tokens[:length]) in contexts


def test_the_same_name_one_after_the_other(api: Api) -> None:
    first = api.ask(COMPLETION, REQUESTS[COMPLETION])
    api.check(first)
    second = api.ask(COMPLETION, REQUESTS[COMPLETION], name=first.name)
    assert first.id == second.id
    both = api.served.trace(first.id, 2)
    compare_by_internal_id(api, both, [first, second])


def test_the_same_name_at_the_same_time(api: Api) -> None:
    name = new_name()
    bodies = [{"prompt": some_tokens(40), "max_tokens": 40, "ignore_eos": True} for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda body: api.ask(COMPLETION, body, name=name), bodies))
    both = api.served.trace(answers[0].id, 2)
    compare_by_internal_id(api, both, answers)


def compare_by_internal_id(api: Api, traces: list[dict[str, Any]], answers: list[Answer]) -> None:
    """Each answer is one trace, and `internal_id` tells them apart."""
    contexts = []
    for trace in traces:
        events = trace["events"]
        assert {e["internal_id"] for e in events} == {trace["internal_id"]}
        contexts.append([e["token_id"] for e in events if e["event"] in ("prompt", "token")])
        api.check_events(events, answers[0].id, 0, contexts[-1])
    assert len({trace["internal_id"] for trace in traces}) == len(answers)
    said = [a.choices[0].prompt + a.choices[0].tokens for a in answers]
    assert sorted(said) == sorted(contexts)


@both_paths
def test_ids_and_priority_in_the_body(api: Api, path: str) -> None:
    """Whatever vLLM makes of them, the stream has the answer's id."""
    body = {**REQUESTS[path], "request_id": new_name(), "priority": 2}
    api.check(api.ask(path, body))
    said = api.post(path, body, timeout=60).json()
    assert said["id"] == PREFIX[path] + body["request_id"]
    (trace,) = api.served.trace(body["request_id"])
    assert trace["request_id"] == said["id"]
