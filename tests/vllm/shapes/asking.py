"""Requests to vLLM's OpenAI server in any shape, and whether the feature stream agrees.

`Api.ask` brings streamed and plain answers of chats and completions into one form; `Api.check`
compares each choice of an answer with its trace: tokens, text, order, ends and features.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.oracle import Comparison, Oracle
from tests.support.served import Served, lines

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PREFIX = {CHAT: "chatcmpl-", COMPLETION: "cmpl-"}
TOP_K = 8

_numbers = itertools.count()


@dataclass
class Choice:
    """What vLLM said of one choice."""

    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class Answer:
    """What vLLM said. `name` is the X-Request-Id sent, `id` what came back."""

    name: str
    id: str = ""
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)


@dataclass
class Api:
    served: Served
    oracle: Oracle

    def post(
        self, path: str, body: dict[str, Any], name: str | None = None, **options: Any
    ) -> httpx.Response:
        headers = {} if name is None else {"X-Request-Id": name}
        url = self.served.chat + path
        return httpx.post(url, json={"model": "tiny", **body}, headers=headers, **options)

    def ask(
        self, path: str, body: dict[str, Any], *, stream: bool = False, name: str | None = None
    ) -> Answer:
        """A chat or a completion that vLLM accepts, as one answer."""
        name = name or new_name()
        body = {"model": "tiny", "return_token_ids": True, **body}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = Answer(name)
        headers = {"X-Request-Id": name}
        with httpx.stream(
            "POST", self.served.chat + path, json=body, headers=headers, timeout=120
        ) as response:
            if not stream or response.status_code != 200:
                text = response.read().decode()
                assert response.status_code == 200, text
                add(answer, json.loads(text))
            else:
                for chunk in data_lines(response):
                    add(answer, chunk)
        return answer

    def traces(self, answer: Answer) -> list[dict[str, Any]]:
        """By choice, once all are finished."""
        found = self.served.trace(answer.id, len(answer.choices))
        assert [one["choice"] for one in found] == sorted(answer.choices)
        return found

    def check(self, answer: Answer) -> list[list[dict[str, Any]]]:
        """Compare every choice with its trace; returns the traces' events."""
        assert answer.choices
        assert all(choice.prompt for choice in answer.choices.values())
        told = [one["events"] for one in self.traces(answer)]
        for index, events in zip(sorted(answer.choices), told, strict=True):
            said = answer.choices[index]
            tokens = self.check_events(events, answer.id, index, [*said.prompt, *said.tokens])
            assert len(said.prompt) == sum(e["event"] == "prompt" for e in tokens)
            assert "".join(e["token"] for e in tokens if e["event"] == "token") == said.text
            done = events[-1]
            assert done["finish_reason"] == said.finish_reason
            assert done["prompt_tokens"] == len(said.prompt)
            assert done["completion_tokens"] == len(said.tokens)
        if answer.usage:
            dones = [events[-1] for events in told]
            assert answer.usage["completion_tokens"] == sum(d["completion_tokens"] for d in dones)
        return told

    def check_events(
        self, events: list[dict[str, Any]], request_id: str, choice: int, context: list[int]
    ) -> list[dict[str, Any]]:
        """One choice that ran to its end: `context` once, in order, with its own features.

        Returns its `prompt` and `token` events.
        """
        tokens = [e for e in events if e["event"] in ("prompt", "token")]
        names = [e["event"] for e in events]
        assert names == ["request", *(e["event"] for e in tokens), "done"]
        assert {(e["request_id"], e["choice"]) for e in events} == {(request_id, choice)}
        assert [e["token_id"] for e in tokens] == context
        assert [e["position"] for e in tokens] == list(range(len(context)))
        prompt = [e for e in tokens if e["event"] == "prompt"]
        assert tokens[: len(prompt)] == prompt
        assert [e["token_index"] for e in tokens[len(prompt) :]] == list(
            range(len(tokens) - len(prompt))
        )
        ran = tokens[:-1]
        assert {e["features_at"] for e in ran} <= {"self"}
        assert all(len(e["top_features"]) == TOP_K for e in ran)
        assert tokens[-1]["features_at"] is None
        assert sum(e.get("cached", False) for e in tokens) == events[-1]["cached_tokens"]
        assert events[-1]["dropped"] == 0
        self.check_features(context, ran)
        return tokens

    def check_features(self, context: list[int], events: list[dict[str, Any]]) -> None:
        comparison = Comparison()
        self.oracle.compare(context, events, comparison)
        assert comparison.wrong == []
        assert comparison.rows == len(events)

    def assert_no_trace(self, name: str) -> None:
        """Nothing was heard of a request, though what was sent after it has been told."""
        self.traces(self.ask(COMPLETION, {"prompt": "after", "max_tokens": 1}))
        recent = httpx.get(f"{self.served.features}/v1/requests").json()["data"]
        assert [one for one in recent if name in one["internal_id"]] == []


def new_name() -> str:
    return f"shape-{next(_numbers)}-{time.monotonic_ns()}"


def some_tokens(count: int) -> list[int]:
    """A prompt that nobody sent before."""
    return [random.randrange(5, 300) for _ in range(count)]


def data_lines(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in lines(response):
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def add(answer: Answer, said: dict[str, Any]) -> None:
    """A whole answer, or a chunk of a streamed one."""
    assert "error" not in said, said
    answer.id = said["id"]
    answer.usage = said.get("usage") or answer.usage
    for one in said["choices"]:
        choice = answer.choices.setdefault(one["index"], Choice())
        message = one.get("message") or one.get("delta") or {"content": one.get("text")}
        choice.text += message.get("content") or ""
        choice.tokens += one.get("token_ids") or []
        # A chat says it once for all its choices, and streams that before the choices' tokens.
        choice.prompt = one.get("prompt_token_ids") or said.get("prompt_token_ids") or choice.prompt
        choice.finish_reason = one.get("finish_reason") or choice.finish_reason
        if one.get("stop_reason") is not None:
            choice.stop_reason = one["stop_reason"]
