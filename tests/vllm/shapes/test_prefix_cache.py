"""vLLM's prefix cache, and the option that does without: positions that did not run have the
features of the request that ran them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vllm.shapes.asking import CHAT, COMPLETION, Answer, Api, new_name, some_tokens

HELLO = {"messages": [{"role": "user", "content": "hello there"}]}
ALL_PROMPT = {"vllm_xargs": {"neuroscope": json.dumps({"prompt_features": "all"})}}

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


def cached_tokens(answer: Answer) -> int:
    return answer.usage["prompt_tokens_details"]["cached_tokens"]


def features(events: list[dict[str, Any]], count: int) -> list[Any]:
    prompt = [e for e in events if e["event"] == "prompt"][:count]
    return [(e["top_features"], e["l0"]) for e in prompt]


@streamed_or_not
def test_a_prompt_seen_before_has_the_features_of_then(api: Api, stream: bool) -> None:
    body = {"prompt": some_tokens(200), "max_tokens": 5}
    first, second = (api.ask(COMPLETION, body, stream=stream) for _ in range(2))
    (before,), (after,) = api.check(first), api.check(second)
    assert cached_tokens(first) == before[-1]["cached_tokens"] == 0
    assert cached_tokens(second) == after[-1]["cached_tokens"] == 192
    prompt = [e for e in after if e["event"] == "prompt"]
    assert [e.get("cached", False) for e in prompt] == [True] * 192 + [False] * 8
    assert features(after, 192) == features(before, 192)


def test_a_conversation_that_goes_on(api: Api) -> None:
    """The answer is part of the next prompt: what was generated comes from the cache too."""
    body = {"prompt": some_tokens(90), "max_tokens": 60, "ignore_eos": True}
    first = api.ask(COMPLETION, body)
    (before,) = api.check(first)
    choice = first.choices[0]
    longer = {"prompt": [*choice.prompt, *choice.tokens, 9, 10], "max_tokens": 4}
    second = api.ask(COMPLETION, longer)
    (after,) = api.check(second)
    assert cached_tokens(second) == after[-1]["cached_tokens"] == 128
    ran = [(e["top_features"], e["l0"]) for e in before if e["event"] in ("prompt", "token")]
    assert features(after, 128) == ran[:128]


def test_choices_share_their_prompt(api: Api) -> None:
    answer = api.ask(COMPLETION, {"prompt": some_tokens(100), "n": 3, "max_tokens": 4})
    api.check(answer)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_all_prompt_features_makes_the_cache_needless(api: Api, path: str) -> None:
    body: dict[str, Any] = {"prompt": some_tokens(100), "max_tokens": 4}
    if path == CHAT:
        text = "a quick fox " * 20 + new_name()
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    api.check(api.ask(path, body))
    cached = api.ask(path, body)
    (without,) = api.check(cached)
    everything = api.ask(path, {**body, **ALL_PROMPT})
    (with_all,) = api.check(everything)
    assert cached_tokens(cached) == without[-1]["cached_tokens"] > 0
    assert cached_tokens(everything) == with_all[-1]["cached_tokens"] == 0
    count = without[-1]["cached_tokens"]
    for (one, _), (other, _) in zip(
        features(without, count), features(with_all, count), strict=True
    ):
        want = {f["index"]: pytest.approx(f["activation"], rel=1e-3, abs=1e-3) for f in one}
        got = {f["index"]: f["activation"] for f in other}
        shared = want.keys() & got.keys()
        assert len(shared) >= len(one) - 1  # two of nearly the same size may trade the last place
        assert {index: got[index] for index in shared} == {index: want[index] for index in shared}


def test_salts_part_the_cache(api: Api) -> None:
    body = {"prompt": some_tokens(100), "max_tokens": 4}
    api.check(api.ask(COMPLETION, body))
    salted = {**body, "cache_salt": "mine"}
    first, second = (api.ask(COMPLETION, salted) for _ in range(2))
    (before,), (after,) = api.check(first), api.check(second)
    assert cached_tokens(first) == before[-1]["cached_tokens"] == 0
    assert cached_tokens(second) == after[-1]["cached_tokens"] == 96
    other = api.ask(COMPLETION, {**body, "cache_salt": "yours"})
    (events,) = api.check(other)
    assert cached_tokens(other) == events[-1]["cached_tokens"] == 0


@streamed_or_not
@pytest.mark.parametrize(
    ("option", "named"),
    [
        ('{"prompt_feature": "all"}', "prompt_feature"),
        ('{"prompt_features": "some"}', "prompt_features"),
        ('{"prompt_features": 1}', "prompt_features"),
        ('{"prompt_features": ', "vllm_xargs.neuroscope"),
        ("[]", "vllm_xargs.neuroscope"),
        (7, "vllm_xargs.neuroscope"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/v1/responses", "/v1/messages"])
def test_a_bad_option_is_refused_by_name(
    api: Api, path: str, option: Any, named: str, stream: bool
) -> None:
    name = new_name()
    body: dict[str, Any] = {
        CHAT: HELLO,
        COMPLETION: {"prompt": "hello"},
        "/v1/responses": {"input": "hello", "request_id": f"resp_{name}"},
        "/v1/messages": {**HELLO, "max_tokens": 9},
    }[path]
    body = {**body, "stream": stream, "vllm_xargs": {"neuroscope": option}}
    response = api.post(path, body, name, timeout=60)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert "vllm_xargs.neuroscope" in message
    assert named in message
    if named == "prompt_feature":
        api.assert_no_trace(name)
