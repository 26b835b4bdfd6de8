"""The traffic of `neuroscope verify`: a mix of requests, each with a reader of its own stream.

The truth about tokens comes from vLLM's answers (`return_token_ids`), never from our streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import click
import httpx

from neuroscope_vllm.core.audit import Answer

STAGGER_S = 0.05
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 300
STREAM_END_S = 20
"""How long a stream may go on after its answer is complete; the hub waits 2 s for late rows."""
TOKENS_PER_WORD = 8
"""More than any tokenizer needs, so that no prompt is refused as too long."""
SHORTEST_CONTEXT = 160
WORDS = [
    *("river", "stone", "winter", "music", "copper", "garden", "engine", "letter", "island"),
    *("mirror", "planet", "bread", "velvet", "thunder", "ladder", "ocean", "paper", "tiger"),
    *("is", "was", "under", "above", "because", "seldom", "the", "a", "and", "of", "12", "407"),
]
SHARING = (3, 7)
"""Kinds of requests that may be served from the prefix cache."""
STOPS = [".", "er", "q"]


class VerifyError(click.ClickException):
    """The audit could not be done, which says nothing about the server's features."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be sent."""

    id: str
    path: str
    body: dict[str, Any]
    leave_after: int | None = None
    """Tokens after which the client disconnects."""
    may_cache: bool = False
    ndjson: bool = False
    """The form of the stream that is read; else SSE."""


@dataclass(slots=True)
class Outcome:
    """What one request got: vLLM's answer, and the events of its stream."""

    ids: set[str] = field(default_factory=set)
    prompt: list[int] = field(default_factory=list)
    choices: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    complete: bool = True
    may_cache: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)

    def hear(self, chunk: dict[str, Any]) -> None:
        """Take a whole answer or a chunk of a streamed one; their token ids lie alike."""
        self.ids.add(chunk["id"])
        self.prompt = self.prompt or chunk.get("prompt_token_ids") or []
        for choice in chunk["choices"]:
            self.prompt = self.prompt or choice.get("prompt_token_ids") or []
            self.choices.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
            # A chat's content may have gone through a parser of tools or of reasoning.
            if (text := choice.get("text")) is not None:
                self.texts[choice["index"]] = self.texts.get(choice["index"], "") + text

    @property
    def answer(self) -> Answer:
        return Answer(
            frozenset(self.ids),
            self.prompt,
            self.choices,
            self.complete,
            self.may_cache,
            self.texts,
        )


def mix(count: int, max_tokens: int, model: str, max_model_len: int) -> list[Ask]:
    """`count` requests of all kinds, with texts that no other run has sent.

    Raises VerifyError where the model's context has no room for them.
    """
    words = min(160, (max_model_len - max_tokens - SHORTEST_CONTEXT // 2) // TOKENS_PER_WORD)
    if words < 8:
        raise VerifyError(
            f"the server's context of {max_model_len} tokens has no room for prompts and"
            f" {max_tokens} generated tokens; give a smaller --max-tokens."
        )
    run = secrets.token_hex(3)
    draw = random.Random(run)
    # Long enough that the prefix cache can share it: on a CPU its blocks are of 128 tokens.
    shared = f"{run} " + " ".join(draw.choices(WORDS, k=words * 3 // 4))
    return [
        _ask(i, f"verify-{run}-{i}", draw, words, shared, model, max_tokens) for i in range(count)
    ]


def _ask(
    i: int, id_: str, draw: random.Random, words: int, shared: str, model: str, max_tokens: int
) -> Ask:
    kind = i % 8
    text = " ".join(draw.choices(WORDS, k=draw.randint(2, words // 4)))
    text = f"{shared} {i} {text}" if kind in SHARING else f"{id_} {text}"
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens - i % 3 if max_tokens > 3 else max_tokens,
        "temperature": float(i % 4 != 1),
        "return_token_ids": True,
        "stream": kind not in (6, 7),
    }
    leave_after = None
    match kind:
        case 2:
            body["n"] = 2
        case 4:
            leave_after = max(max_tokens // 2, 1)
            body["ignore_eos"] = True
        case 5:
            body |= {"stop": STOPS, "min_tokens": max_tokens // 3}
    if kind not in SHARING:
        body["vllm_xargs"] = {"neuroscope": '{"prompt_features": "all"}'}
    if kind in (1, 3, 6):
        path, body["prompt"] = "/v1/completions", text
    else:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
    return Ask(id_, path, body, leave_after, kind in SHARING, ndjson=bool(i // 8 % 2))


async def storm(
    url: str, asks: list[Ask], concurrency: int, api_key: str | None, advance: Callable[[], object]
) -> list[Outcome]:
    """Send all requests, staggered and at most `concurrency` at once, each with its reader.

    Raises VerifyError where the server refuses one or stops answering.
    """
    turn = asyncio.Semaphore(concurrency)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=None)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=timeout, limits=limits
    ) as client:

        async def one(number: int, ask: Ask) -> Outcome:
            await asyncio.sleep(number * STAGGER_S)
            async with turn:
                outcome = await _watched(client, ask)
            advance()
            return outcome

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*numbered)) for numbered in enumerate(asks)]
        except ExceptionGroup as errors:
            raise _as_verify_error(url, errors.exceptions[0]) from None
    return [task.result() for task in tasks]


def _as_verify_error(url: str, error: Exception) -> Exception:
    """What ended the storm, as its user should hear it."""
    if not isinstance(error, httpx.HTTPError):
        return error
    name = type(error).__name__
    return VerifyError(f"the server at {url} stopped answering ({name}); look at its log.")


async def _watched(client: httpx.AsyncClient, ask: Ask) -> Outcome:
    """Send a request while its stream is being read, from before it exists."""
    outcome = Outcome(may_cache=ask.may_cache)
    accept = "application/x-ndjson" if ask.ndjson else "text/event-stream"
    async with client.stream(
        "GET",
        "/v1/features/stream",
        params={"request_id": ask.id},
        headers={"Accept": accept},
    ) as stream:
        await _check(stream)
        reader = asyncio.create_task(_read(stream, outcome.events))
        try:
            await _send(client, ask, outcome)
            # A stream that never ends has its positions missing, or it does no harm.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader, STREAM_END_S)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
    if not outcome.prompt or not all(outcome.choices.values()):
        raise VerifyError(
            f"vLLM answered request {ask.id} without its token ids (return_token_ids), so nothing"
            " can be checked; serve with vLLM 0.26 or newer."
        )
    return outcome


async def _read(stream: httpx.Response, events: list[dict[str, Any]]) -> None:
    name = ""
    async for line in stream.aiter_lines():
        kind, _, value = line.partition(": ")
        if kind == "event":
            name = value
        elif kind == "data":
            events.append({"event": name, **json.loads(value)})
        elif line.startswith("{"):
            events.append(json.loads(line))


async def _send(client: httpx.AsyncClient, ask: Ask, outcome: Outcome) -> None:
    async with client.stream(
        "POST", ask.path, json=ask.body, headers={"X-Request-Id": ask.id}
    ) as response:
        await _check(response)
        if not ask.body["stream"]:
            outcome.hear(json.loads(await response.aread()))
            return
        async for chunk in _chunks(response):
            outcome.hear(chunk)
            if ask.leave_after and len(outcome.choices.get(0, ())) >= ask.leave_after:
                outcome.complete = False
                return


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise VerifyError(f"vLLM broke off an answer: {chunk['error'].get('message')}")
            yield chunk


async def _check(response: httpx.Response) -> None:
    if response.status_code != 200:
        await response.aread()
        raise refusal(response)


def refusal(response: httpx.Response) -> VerifyError:
    """What the server said when it did not answer 200."""
    try:
        body = response.json()
        said = body["error"]["message"] if "error" in body else body["detail"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    hint = " Give its key with --api-key." if response.status_code in (401, 403) else ""
    return VerifyError(
        f"{response.url.path} was refused with {response.status_code}: {said or 'no reason'}{hint}"
    )
