"""Both ports of a running server, as `neuroscope steer` asks them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import click
import httpx
import msgspec

from neuroscope_vllm.cli.storm import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, refusal

TRACE_TIMEOUT_S = 30
"""How long a trace may take to end after its answer; the hub waits 2 s for late rows."""
AT_ONCE = 8
"""Requests that run at the same time."""


class ServerRefused(click.ClickException):
    """The server's own sentence on a request that it does not take."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the model, steered and not.

    Attributes:
        seed: Of the draw; None: nothing is drawn (temperature 0), and no seed is sent.
    """

    prompt: str
    system: str | None
    chat: bool
    max_tokens: int
    temperature: float
    seed: int | None

    def body(self) -> tuple[str, dict[str, Any]]:
        """Path, and all of the request but the model and the steering."""
        sampling: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.seed is not None:
            sampling["seed"] = self.seed
        if not self.chat:
            return "/v1/completions", {**sampling, "prompt": self.prompt}
        said = [("system", self.system)] if self.system is not None else []
        messages = [{"role": r, "content": text} for r, text in (*said, ("user", self.prompt))]
        return "/v1/chat/completions", {**sampling, "messages": messages}


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """An answer and its trace: the events of the hub, as they came."""

    request_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    events: list[dict[str, Any]]
    events_lost: int


class Server:
    """A running server.

    Attributes:
        model: As vLLM serves it.
        special: Ids of special tokens.
    """

    def __init__(self, vllm: httpx.AsyncClient, features: httpx.AsyncClient) -> None:
        self._vllm, self._features = vllm, features
        self._turn = asyncio.Semaphore(AT_ONCE)
        self.model = ""
        self.special: frozenset[int] = frozenset()
        self._max_tokens = sys.maxsize

    async def greet(self) -> None:
        """Raises click.ClickException: one of the two is away, or is something else."""
        described = await self._get(self._features, "/v1/features/describe")
        where = self._features.base_url
        if described.status_code != 200:
            raise click.ClickException(
                f"{where} is not a neuroscope server. {refusal(described).message}"
            )
        description = _json(described)
        if not description["armed"] or not description["sites"]:
            reasons = " ".join(description["problems"]) or "No worker has said that it is armed."
            raise click.ClickException(f"the server at {where} does not observe: {reasons}")
        models = await self._get(self._vllm, "/v1/models")
        if models.status_code != 200:
            raise refusal(models)
        served = {model["id"]: model for model in _json(models)["data"]}
        self.model = description["model"]
        if self.model not in served:
            raise click.ClickException(
                f"{self._vllm.base_url} serves {', '.join(served)}, and the features at {where} are"
                f" of {self.model}; give the --url and --features-url of one server."
            )
        self._max_tokens = served[self.model].get("max_model_len") or sys.maxsize
        self.special = frozenset(description.get("special_token_ids", ()))

    async def answer(self, ask: Ask, options: dict[str, Any]) -> Answered:
        """Raises ServerRefused: The server takes no such request."""
        path, body = ask.body()
        # What vLLM has in its prefix cache would come without the features of this run.
        given = json.dumps({**options, "prompt_features": "all"})
        body |= {
            "model": self.model,
            "return_token_ids": True,
            "vllm_xargs": {"neuroscope": given},
        }
        async with self._turn:
            said = await self._post(path, body)
            trace = await self._trace(said["id"])
        (choice,) = said["choices"]
        prompt_ids = said.get("prompt_token_ids") or choice.get("prompt_token_ids")
        if not prompt_ids or choice.get("token_ids") is None:
            raise click.ClickException(
                f"vLLM at {self._vllm.base_url} answered without its token ids"
                " (return_token_ids); serve with vLLM 0.26 or newer."
            )
        text = choice["message"]["content"] if ask.chat else choice["text"]
        return Answered(
            request_id=said["id"],
            prompt_ids=prompt_ids,
            token_ids=choice["token_ids"],
            text=text or "",
            finish_reason=choice["finish_reason"],
            events=trace["events"],
            events_lost=trace["events_total"] - trace["events_kept"],
        )

    async def logprobs(self, answered: Answered) -> list[float]:
        """Of each token of an answer, under the unsteered model.

        The ids themselves are sent, so that nothing is tokenized anew.
        """
        # vLLM generates one token more, which has to fit.
        ids = [*answered.prompt_ids, *answered.token_ids][: self._max_tokens - 1]
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        async with self._turn:
            said = await self._post("/v1/completions", body)
        listed = said["choices"][0]["prompt_logprobs"]
        start = len(answered.prompt_ids)
        pairs = zip(listed[start:], ids[start:], strict=True)
        return [ranked[str(token)]["logprob"] for ranked, token in pairs]

    async def label(self, layer: int, index: int) -> dict[str, Any] | None:
        """The label that the stream would show."""
        found = await self._get(
            self._features, "/v1/features/labels", {"layer": layer, "index": index, "limit": 1}
        )
        if found.status_code != 200:
            raise refusal(found)
        return next(iter(_json(found)["data"]), None)

    async def _trace(self, request_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + TRACE_TIMEOUT_S
        while time.monotonic() < deadline:
            found = await self._get(self._features, f"/v1/requests/{request_id}")
            # 404: the hub has not heard of it yet.
            if found.status_code not in (200, 404):
                raise refusal(found)
            choices = _json(found)["choices"] if found.status_code == 200 else []
            if choices and choices[0]["finished"]:
                return choices[0]
            await asyncio.sleep(0.05)
        raise click.ClickException(
            f"vLLM answered request {request_id}, but {self._features.base_url} did not tell its"
            f" end in {TRACE_TIMEOUT_S} s; are --url and --features-url of one server?"
        )

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"X-Request-Id": f"steer-{uuid.uuid4().hex}"}
        with _connected(self._vllm):
            said = await self._vllm.post(path, json=body, headers=headers)
        if said.status_code == 400:
            raise ServerRefused(" ".join(refusal(said).message.split()))
        if said.status_code != 200:
            raise refusal(said)
        return _json(said)

    async def _get(
        self, client: httpx.AsyncClient, path: str, query: dict[str, Any] | None = None
    ) -> httpx.Response:
        with _connected(client):
            return await client.get(path, params=query)


@contextlib.asynccontextmanager
async def connected(url: str, features_url: str, api_key: str | None) -> AsyncIterator[Server]:
    """Raises click.ClickException: It is away, or not such a server."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=None)
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for one in (url, features_url):
            try:
                client = httpx.AsyncClient(base_url=one, headers=headers, timeout=timeout)
            except httpx.InvalidURL as error:
                raise click.ClickException(f"{one} is no URL ({error}).") from None
            clients.append(await stack.enter_async_context(client))
        server = Server(*clients)
        await server.greet()
        yield server


def _json(response: httpx.Response) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(said := response.json(), dict):
            return said
    raise click.ClickException(
        f"{response.url} answered with no JSON object, so it is no such server; name the right one"
        " with --url and --features-url."
    )


@contextlib.contextmanager
def _connected(client: httpx.AsyncClient) -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
        raise click.ClickException(
            f"nobody answers at {client.base_url} ({type(error).__name__}); start a server with"
            " `neuroscope serve`, or name its ports with --url and --features-url."
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise click.ClickException(
            f"the server at {client.base_url} broke off ({type(error).__name__}); see its log."
        ) from None
