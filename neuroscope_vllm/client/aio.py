"""The client of a running server, for asyncio: see `sync`, whose twin this is."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from httpx_sse import aconnect_sse

from neuroscope_vllm.client import calls
from neuroscope_vllm.client.calls import Call, Steering
from neuroscope_vllm.client.following import PATH, PATIENCE_S, RETOLD_S, Event, Following
from neuroscope_vllm.client.records import Card, Described, Label, Steered
from neuroscope_vllm.client.trace import Trace
from neuroscope_vllm.core.config import API_KEY_VARIABLE

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
OpenAIClient = TypeVar("OpenAIClient", bound="AsyncOpenAI")

POLL_S = 0.05
TRACE_WAIT_S = 30.0


class AsyncClient:
    """`Client` with await and async for.

        async with AsyncClient() as client:
            async for event in client.stream("my-chat"):
                ...

    Attributes:
        features: What features mean: `get` and `search`.
        url: Of the features port, without a slash at its end.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8081",
        api_key: str | None = None,
        stream_secret: str | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: Of the server's features port.
            api_key: One of vLLM's, or an admin's; None: $NEUROSCOPE_API_KEY.
            stream_secret: Of the requests that this one reads; those that it sends, or that a
                wrapped client does, bear it, and are told to nobody who does not show it.
        """
        api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        self.url = url.rstrip("/")
        self.api_key, self.stream_secret = api_key, stream_secret
        with calls.reached(self.url):
            self._http = httpx.AsyncClient(
                base_url=self.url, **calls.http_options(api_key, stream_secret)
            )
        self.features = AsyncFeatures(self)
        self._described: Described | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. Streams that others still read end with the next that comes."""
        await self._http.aclose()

    async def stream(
        self, request_id: str | None = None, *, patience: float = PATIENCE_S, **view: Any
    ) -> AsyncIterator[Event]:
        """See `Client.stream`."""
        self._check_open()
        following = Following(self.url, request_id, view, patience)
        while True:
            try:
                asked = following.request()
                async with aconnect_sse(self._http, "GET", PATH, **asked) as got:
                    if got.response.status_code != 200:
                        await got.response.aread()
                    if not following.connected(got.response):
                        return
                    async for sse in got.aiter_sse():
                        if (event := following.hear(sse)) is not None:
                            yield event
                        if following.lost:
                            await self._wait_retold(following)
                if following.over():
                    return
            except httpx.TransportError as error:
                following.broke(error)
            await asyncio.sleep(following.pause())
            if self._http.is_closed:
                return

    async def trace(
        self, request_id: str, *, wait: float = TRACE_WAIT_S, since: float = 0.0
    ) -> Trace:
        """See `Client.trace`."""
        special = (await self.describe()).special_token_ids
        deadline = time.monotonic() + wait
        while True:
            response = await self._get(f"/v1/requests/{calls.quoted(request_id)}")
            late = time.monotonic() >= deadline
            # 404: the side process has not heard of it yet.
            if response.status_code != 404 or late:
                with calls.reached(self.url):
                    trace = Trace.decode(calls.checked(response), special, since)
                if trace is not None and (trace.finished or late):
                    return trace
                if late:
                    raise calls.not_since(request_id)
            await asyncio.sleep(POLL_S)

    async def inspect(self, text: str, chat: bool = False) -> Trace:
        """See `Client.inspect`."""
        request_id = await self._ask(
            calls.inspect(text, chat, (await self.describe()).model, self.stream_secret)
        )
        return (await self.trace(request_id)).prompts_only()

    async def steer(self, request_id: str, spec: Steering | None) -> Steered:
        """See `Client.steer`."""
        return await self._ask(calls.steer(request_id, spec))

    def wrap(self, openai: OpenAIClient) -> OpenAIClient:
        """See `Client.wrap`; of openai.AsyncOpenAI."""
        from neuroscope_vllm.client.wrap import wrapped_async

        return wrapped_async(self, openai)

    async def describe(self) -> Described:
        """See `Client.describe`."""
        if self._described is None or not self._described.sites:
            self._described = await self._ask(calls.describe())
        return self._described

    async def _ask(self, call: Call[T]) -> T:
        self._check_open()
        with calls.reached(self.url):
            response = await self._http.request(
                call.method, call.path, params=call.params, json=call.body, headers=call.headers
            )
            return call.parse(calls.checked(response))

    async def _get(self, path: str) -> httpx.Response:
        self._check_open()
        with calls.reached(self.url):
            return await self._http.get(path)

    def _check_open(self) -> None:
        """Raises ServerError: This client was closed."""
        if self._http.is_closed:
            raise calls.closed(self.url)

    async def _wait_retold(self, following: Following) -> None:
        """Raises ServerError: nothing is known of the request any more."""
        assert following.request_id is not None
        path = f"/v1/requests/{calls.quoted(following.request_id)}"
        deadline = time.monotonic() + RETOLD_S
        while (await self._http.get(path)).status_code == 404:
            if time.monotonic() > deadline:
                raise following.forgotten()
            await asyncio.sleep(POLL_S)
        following.lost = False


class AsyncFeatures:
    """What features mean."""

    def __init__(self, client: AsyncClient) -> None:
        self._ask = client._ask  # pyright: ignore[reportPrivateUsage]

    async def get(self, index: int, layer: int | None = None) -> Card:
        """See `Features.get`."""
        return await self._ask(calls.card(index, layer))

    async def search(
        self,
        q: str | None = None,
        *,
        index: int | None = None,
        layer: int | None = None,
        labeller: str | None = None,
        limit: int = 20,
    ) -> list[Label]:
        """See `Features.search`."""
        query = {"index": index, "layer": layer, "labeller": labeller, "limit": limit}
        return await self._ask(calls.labels(q, **query))
