"""OpenAI's clients with features: see `Client.wrap`."""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from neuroscope_vllm.client.aio import AsyncClient
from neuroscope_vllm.client.alignment import Alignment
from neuroscope_vllm.core.errors import ConfigError, ServerError
from neuroscope_vllm.core.events import TokenEvent

if TYPE_CHECKING:
    from neuroscope_vllm.client.following import Event
    from neuroscope_vllm.client.sync import Client

logger = logging.getLogger(__name__)

WAIT_S = 10.0
"""Longer than a side process takes to be started again; then a chunk goes without."""
LATE = f"they did not come within {WAIT_S:g} s"


def features_of(answer: Any) -> list[TokenEvent] | None:
    """`answer.features`, typed; None: they are not known, or the answer is of another client."""
    return getattr(answer, "features", None)


def wrapped(client: Client, openai: Any) -> Any:
    """Raises ConfigError: it is no OpenAI client that `client` can wrap."""
    from openai import OpenAI

    if not isinstance(openai, OpenAI):
        raise ConfigError(_no_client(openai, "Client", "OpenAI", "AsyncClient"))
    copy = openai.copy()
    for resource, kinds in _resources(copy):
        resource.create = _create(client, resource.create, kinds)
    return copy


def wrapped_async(client: AsyncClient, openai: Any) -> Any:
    """Raises ConfigError: it is no OpenAI client that `client` can wrap."""
    from openai import AsyncOpenAI

    if not isinstance(openai, AsyncOpenAI):
        raise ConfigError(_no_client(openai, "AsyncClient", "AsyncOpenAI", "Client"))
    copy = openai.copy()
    for resource, kinds in _resources(copy):
        resource.create = _create_async(client, resource.create, kinds)
    return copy


def _resources(openai: Any) -> list[tuple[Any, tuple[type, ...]]]:
    """What answers, and the kinds of whole and streamed answers that are not raw responses."""
    from openai import AsyncStream, Stream
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    kinds = (ChatCompletion, Completion, Stream, AsyncStream)
    return [(openai.chat.completions, kinds), (openai.completions, kinds)]


def _no_client(openai: Any, ours: str, fits: str, other: str) -> str:
    return (
        f"{ours}.wrap takes openai.{fits}, and was given {type(openai).__name__}; give one, or use"
        f" {other}.wrap."
    )


def _create(client: Client, create: Any, kinds: tuple[type, ...]) -> Any:
    @functools.wraps(create)
    def with_features(*args: Any, **kwargs: Any) -> Any:
        answer = create(*args, **kwargs)
        if not isinstance(answer, kinds):
            return answer
        if hasattr(answer, "choices"):
            return _attach(answer, _of_whole(client, answer))
        return WatchedStream(answer, client)

    return with_features


def _create_async(client: AsyncClient, create: Any, kinds: tuple[type, ...]) -> Any:
    @functools.wraps(create)
    async def with_features(*args: Any, **kwargs: Any) -> Any:
        answer = await create(*args, **kwargs)
        if not isinstance(answer, kinds):
            return answer
        if hasattr(answer, "choices"):
            return _attach(answer, await _of_whole_async(client, answer))
        return AsyncWatchedStream(answer, client)

    return with_features


def _attach(answer: Any, features: list[TokenEvent] | None) -> Any:
    # Not as pydantic's extra field, which `model_dump_json` could not write.
    answer.__dict__["features"] = features
    return answer


def _of_whole(client: Client, answer: Any) -> list[TokenEvent] | None:
    try:
        return client.trace(answer.id, wait=WAIT_S).answer
    except ServerError as error:
        return _without(answer.id, error)


async def _of_whole_async(client: AsyncClient, answer: Any) -> list[TokenEvent] | None:
    try:
        return (await client.trace(answer.id, wait=WAIT_S)).answer
    except ServerError as error:
        return _without(answer.id, error)


def _without(request_id: str, reason: object) -> None:
    logger.warning("neuroscope: the answer %s comes without features: %s", request_id, reason)


class WatchedStream:
    """An openai.Stream whose chunks have `features`; what else it has, too."""

    def __init__(self, stream: Any, client: Client) -> None:
        self._stream = stream
        self._chunks = self._watched(client)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        return self._chunks

    def __next__(self) -> Any:
        return next(self._chunks)

    def __enter__(self) -> WatchedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._chunks.close()
        self._stream.close()

    def _watched(self, client: Client) -> Generator[Any]:
        reader: _Reader | None = None
        alignment = Alignment()
        try:
            for chunk in self._stream:
                reader = reader or _Reader(client, chunk.id)
                alignment.said(chunk)
                yield _attach(chunk, reader.features(chunk, alignment))
        finally:
            if reader is not None:
                reader.close()


class Background:
    """A thread that reads streams for clients without a loop, so that waiting for one can end."""

    def __init__(self, client: Client) -> None:
        self.client = AsyncClient(client.url, client.api_key)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="neuroscope-features", daemon=True).start()

    def close(self) -> None:
        """End all readers, and the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self) -> None:
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self._end())
        finally:
            self.loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()


class _Reader:
    """The events of an answer, read in the background."""

    def __init__(self, client: Client, request_id: str) -> None:
        background = client.background()
        self._request_id = request_id
        self._events: queue.SimpleQueue[Event | ServerError] = queue.SimpleQueue()
        self._lost = False
        reading = _read(background.client, request_id, self._events.put)
        self._future = asyncio.run_coroutine_threadsafe(reading, background.loop)

    def features(self, chunk: Any, alignment: Alignment) -> list[TokenEvent] | None:
        deadline = time.monotonic() + WAIT_S
        while not self._lost and alignment.waits(chunk):
            try:
                event = self._events.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                event = ServerError(LATE)
            if isinstance(event, ServerError):
                self._lost = True
                _without(self._request_id, event)
            else:
                alignment.hear(event)
        return None if self._lost else alignment.take(chunk)

    def close(self) -> None:
        self._future.cancel()


class AsyncWatchedStream:
    """An openai.AsyncStream whose chunks have `features`; what else it has, too."""

    def __init__(self, stream: Any, client: AsyncClient) -> None:
        self._stream = stream
        self._chunks = self._watched(client)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._chunks

    async def __anext__(self) -> Any:
        return await anext(self._chunks)

    async def __aenter__(self) -> AsyncWatchedStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._chunks.aclose()
        await self._stream.close()

    async def _watched(self, client: AsyncClient) -> AsyncGenerator[Any]:
        reader: _AsyncReader | None = None
        alignment = Alignment()
        try:
            async for chunk in self._stream:
                reader = reader or _AsyncReader(client, chunk.id)
                alignment.said(chunk)
                yield _attach(chunk, await reader.features(chunk, alignment))
        finally:
            if reader is not None:
                reader.close()


class _AsyncReader:
    """Reads a request's stream in a task."""

    def __init__(self, client: AsyncClient, request_id: str) -> None:
        self._request_id = request_id
        self._events: asyncio.Queue[Event | ServerError] = asyncio.Queue()
        self._lost = False
        reading = _read(client, request_id, self._events.put_nowait)
        self._task = asyncio.create_task(reading)

    async def features(self, chunk: Any, alignment: Alignment) -> list[TokenEvent] | None:
        deadline = time.monotonic() + WAIT_S
        while not self._lost and alignment.waits(chunk):
            left = max(deadline - time.monotonic(), 0.0)
            try:
                event = await asyncio.wait_for(self._events.get(), left)
            except TimeoutError:
                event = ServerError(LATE)
            if isinstance(event, ServerError):
                self._lost = True
                _without(self._request_id, event)
            else:
                alignment.hear(event)
        return None if self._lost else alignment.take(chunk)

    def close(self) -> None:
        self._task.cancel()


async def _read(
    client: AsyncClient, request_id: str, put: Callable[[Event | ServerError], None]
) -> None:
    try:
        async for event in client.stream(request_id, include="token"):
            put(event)
        put(ServerError("its feature stream ended before it did"))
    except ServerError as error:
        put(error)
