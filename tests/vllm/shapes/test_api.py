"""Every shape of request that vLLM's OpenAI server takes, over HTTP: the stream says what vLLM
answered, and each token has the features that HF transformers and SAELens compute."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.vllm.shapes.asking import (
    CHAT,
    COMPLETION,
    PREFIX,
    Answer,
    Api,
    data_lines,
    new_name,
    some_tokens,
)

EOS = 1
LONGEST = 1024
Body = dict[str, Any]
REQUESTS: dict[str, Body] = {
    CHAT: {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 24},
    COMPLETION: {"prompt": "Paris is the capital", "max_tokens": 24},
}
# Greedy, but this model would say one token for ever.
REPEATABLE = {"temperature": 0, "repetition_penalty": 2.0}

both_paths = pytest.mark.parametrize("path", [CHAT, COMPLETION])
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


# How a request ends


def by_eos(answer: Answer) -> Body:
    """EOS as soon as it is allowed."""
    return {"logit_bias": {str(EOS): 100}, "min_tokens": 5}


def by_stop_string(answer: Answer) -> Body:
    return {"stop": middle_of(answer)}


def by_stop_string_included(answer: Answer) -> Body:
    return {"stop": middle_of(answer), "include_stop_str_in_output": True}


def by_stop_string_after_min_tokens(answer: Answer) -> Body:
    """It comes early and does not count; the later one does."""
    return {"stop": middle_of(answer), "min_tokens": 20, "max_tokens": 60}


def by_stop_token(answer: Answer) -> Body:
    return {"stop_token_ids": [answer.choices[0].tokens[8]]}


def by_stop_token_included(answer: Answer) -> Body:
    return {**by_stop_token(answer), "include_stop_str_in_output": True}


def by_length(answer: Answer) -> Body:
    return {"max_tokens": 7}


def by_length_of_one(answer: Answer) -> Body:
    return {"max_tokens": 1}


def by_length_with_stop_strings(answer: Answer) -> Body:
    """Text is held back for stop strings that never come."""
    return {"stop": ["no such text", "nor that"]}


ENDS = {
    by_eos: "stop",
    by_stop_string: "stop",
    by_stop_string_included: "stop",
    by_stop_string_after_min_tokens: None,
    by_stop_token: "stop",
    by_stop_token_included: "stop",
    by_length: "length",
    by_length_of_one: "length",
    by_length_with_stop_strings: "length",
}


def middle_of(answer: Answer) -> str:
    """A stop string of several characters, none of them broken, that comes in the middle."""
    text = answer.choices[0].text
    starts = range(len(text) // 3, len(text) - 2)
    return next(text[at : at + 3] for at in starts if "\ufffd" not in text[at : at + 3])


@pytest.fixture(scope="module", params=REQUESTS, ids=["chat", "completion"])
def likely(request: pytest.FixtureRequest, api: Api) -> tuple[str, Answer]:
    """What comes when nothing stops it, every time anew."""
    path = request.param
    return path, api.ask(path, {**REQUESTS[path], **REPEATABLE, "min_tokens": 24})


@streamed_or_not
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_ends(api: Api, likely: tuple[str, Answer], end: Any, stream: bool) -> None:
    path, unstopped = likely
    body = {**REQUESTS[path], **REPEATABLE, **end(unstopped)}
    answer = api.ask(path, body, stream=stream)
    assert answer.id == PREFIX[path] + answer.name
    if ENDS[end] is not None:
        assert answer.choices[0].finish_reason == ENDS[end]
    if "min_tokens" in body:
        assert len(answer.choices[0].tokens) >= body["min_tokens"]
    api.check(answer)


@both_paths
def test_a_client_that_leaves_a_stream(api: Api, path: str) -> None:
    name, tokens, text = new_name(), [], ""
    body = {**REQUESTS[path], "max_tokens": 900, "ignore_eos": True, "return_token_ids": True}
    with httpx.stream(
        "POST",
        api.served.chat + path,
        json={"model": "tiny", "stream": True, **body},
        headers={"X-Request-Id": name},
        timeout=60,
    ) as response:
        for chunk in data_lines(response):
            for choice in chunk["choices"]:
                tokens += choice.get("token_ids") or []
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            if len(tokens) > 8:
                break
    events = abort_of(api, PREFIX[path] + name)
    told = [e for e in events if e["event"] == "token"]
    assert [e["token_id"] for e in told][: len(tokens)] == tokens
    assert "".join(e["token"] for e in told).startswith(text)
    assert len(tokens) <= len(told) < 900


@both_paths
@pytest.mark.parametrize("patience", [0.02, 0.5])
def test_a_client_that_leaves_before_the_answer(api: Api, path: str, patience: float) -> None:
    name = new_name()
    prompt: Body = (
        {"prompt": some_tokens(600)}
        if path == COMPLETION
        else {"messages": [{"role": "user", "content": "a quick fox " * 100}]}
    )
    body = {**prompt, "max_tokens": 300, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        api.post(path, body, name, timeout=patience)
    try:
        found = api.served.trace(PREFIX[path] + name, timeout=5)
    except AssertionError:
        assert patience < 0.1  # gone before the engine heard of it
        return
    if found[0]["events"][-1]["finish_reason"] != "length":  # vLLM noticed
        abort_of(api, PREFIX[path] + name)


def abort_of(api: Api, request_id: str) -> list[dict[str, Any]]:
    """The events of a request whose client left: what ran has its features, in order."""
    (trace,) = api.served.trace(request_id)
    events = trace["events"]
    tokens = [e for e in events if e["event"] in ("prompt", "token")]
    assert events[-1]["finish_reason"] == "abort"
    assert [e["event"] for e in events[1:-1]] == [e["event"] for e in tokens]
    assert [e["position"] for e in tokens] == list(range(len(tokens)))
    assert events[0]["prompt_tokens"] == sum(e["event"] == "prompt" for e in tokens)
    ran = [e for e in tokens if e["features_at"] == "self"]
    assert ran == tokens[: len(ran)]
    if events[-1]["completion_tokens"]:
        assert len(tokens) - len(ran) <= 1
    api.check_features([e["token_id"] for e in tokens], ran)
    return events


# What else a request can ask for


@streamed_or_not
@both_paths
@pytest.mark.parametrize(
    "extra",
    [
        {"structured_outputs": {"choice": ["Paris is old", "Rome"]}},
        {"structured_outputs": {"regex": "[0-9]{3} [a-z]{4}"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "city",
                    "schema": {
                        "type": "object",
                        "properties": {"old": {"type": "boolean"}},
                        "required": ["old"],
                        "additionalProperties": False,
                    },
                },
            },
        },
    ],
    ids=["choice", "regex", "json"],
)
def test_structured_output(api: Api, path: str, extra: Body, stream: bool) -> None:
    answer = api.ask(path, {**REQUESTS[path], "max_tokens": 60, **extra}, stream=stream)
    assert answer.choices[0].finish_reason == "stop" or "response_format" in extra
    api.check(answer)


@both_paths
@pytest.mark.parametrize(
    "extra",
    [{"prompt_logprobs": 2}, {"logprobs": 3, "n": 2}, {"repetition_penalty": 1.3, "top_k": 5}],
    ids=lambda extra: "+".join(extra),
)
def test_logprobs_and_sampling(api: Api, path: str, extra: Body) -> None:
    if path == CHAT and "logprobs" in extra:
        extra = {**extra, "logprobs": True, "top_logprobs": 3}
    first = api.ask(path, {**REQUESTS[path], **extra})
    api.check(first)
    api.check(api.ask(path, {**REQUESTS[path], **extra}))


@streamed_or_not
def test_echo_repeats_the_prompt(api: Api, stream: bool) -> None:
    # With token ids vLLM repeats no text.
    body = {**REQUESTS[COMPLETION], "echo": True, "return_token_ids": False}
    answer = api.ask(COMPLETION, body, stream=stream)
    (trace,) = api.traces(answer)
    tokens = [e for e in trace["events"] if e["event"] in ("prompt", "token")]
    api.check_events(trace["events"], answer.id, 0, [e["token_id"] for e in tokens])
    assert "".join(e["token"] for e in tokens) == answer.choices[0].text
    told = "".join(e["token"] for e in tokens if e["event"] == "prompt")
    assert told == REQUESTS[COMPLETION]["prompt"]


def test_echo_of_nothing_but_the_prompt(api: Api) -> None:
    """vLLM still samples a token, which its text does not show."""
    answer = api.ask(COMPLETION, {**REQUESTS[COMPLETION], "echo": True, "max_tokens": 0})
    choice = answer.choices[0]
    (trace,) = api.traces(answer)
    api.check_events(trace["events"], answer.id, 0, [*choice.prompt, *choice.tokens])


# Prompts


def test_the_longest_prompt(api: Api) -> None:
    answer = api.ask(COMPLETION, {"prompt": some_tokens(LONGEST - 1), "max_tokens": 1})
    (events,) = api.check(answer)
    assert events[-1]["prompt_tokens"] == LONGEST - 1


def test_up_to_the_end_of_the_context(api: Api) -> None:
    body = {"prompt": some_tokens(LONGEST - 9), "ignore_eos": True, "max_tokens": None}
    answer = api.ask(COMPLETION, body)
    assert len(answer.choices[0].tokens) == 9
    api.check(answer)


@streamed_or_not
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [7] * LONGEST, "max_tokens": 1},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": "x", "max_tokens": -1},
        {"prompt": [10**6]},
        {"prompt": "x", "temperature": -1},
    ],
    ids=["too-long", "empty", "no-prompt", "max_tokens", "token", "temperature"],
)
def test_what_vllm_refuses_leaves_no_trace(api: Api, body: Body, stream: bool) -> None:
    name = new_name()
    response = api.post(COMPLETION, {**body, "stream": stream}, name, timeout=60)
    # What vLLM finds wrong only after its answer began is an error in the stream.
    assert response.status_code == 400 or (stream and '"code": 400' in response.text)
    api.assert_no_trace(name)


def test_a_truncated_prompt(api: Api) -> None:
    body = {"prompt": some_tokens(300), "truncate_prompt_tokens": 50, "max_tokens": 5}
    answer = api.ask(COMPLETION, body)
    assert answer.choices[0].prompt == body["prompt"][-50:]
    api.check(answer)
