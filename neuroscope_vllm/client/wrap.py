"""OpenAI's clients with features: see `Client.wrap`."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from neuroscope_vllm.client.aio import POLL_S, AsyncClient
from neuroscope_vllm.client.alignment import CLOCK_S, Alignment, Answered, Own
from neuroscope_vllm.core.errors import ConfigError, ServerError
from neuroscope_vllm.core.events import TokenEvent
from neuroscope_vllm.core.request import KEY

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
    return _copied(openai, {}, functools.partial(_create, client, Answered()))


def wrapped_async(client: AsyncClient, openai: Any) -> Any:
    """Raises ConfigError: it is no OpenAI client that `client` can wrap."""
    from openai import AsyncOpenAI

    if not isinstance(openai, AsyncOpenAI):
        raise ConfigError(_no_client(openai, "AsyncClient", "AsyncOpenAI", "Client"))
    return _copied(openai, {}, functools.partial(_create_async, client, Answered()))


def _copied(openai: Any, options: dict[str, Any], watched: Callable[[Any], Any]) -> Any:
    """A copy whose answers are watched, and so are those of its own copies.

    Args:
        options: As of `openai.copy`.
        watched: Makes a method that answers into one whose answers have features.
    """
    # Of the class: the copy of a wrapped client is to be plain, or all would be watched twice.
    copy = openai.__class__.copy(openai, **options)
    for resource in (copy.chat.completions, copy.beta.chat.completions, copy.completions):
        for name in ("create", "parse"):
            if hasattr(resource, name):
                setattr(resource, name, watched(getattr(resource, name)))

    def again(**more: Any) -> Any:
        return _copied(copy, more, watched)

    copy.copy = copy.with_options = again
    return copy


@functools.cache
def _kinds() -> tuple[type, ...]:
    """Of whole and of streamed answers, which raw responses are not."""
    from openai import AsyncStream, Stream
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    return ChatCompletion, Completion, Stream, AsyncStream


def _no_client(openai: Any, ours: str, fits: str, other: str) -> str:
    return (
        f"{ours}.wrap takes openai.{fits}, and was given {type(openai).__name__}; give one, or use"
        f" {other}.wrap."
    )


def _create(client: Client, answered: Answered, create: Any) -> Any:
    @functools.wraps(create)
    def with_features(*args: Any, **kwargs: Any) -> Any:
        answer = create(*args, **_with_secret(client.stream_secret, kwargs))
        if not isinstance(answer, _kinds()):
            return answer
        if hasattr(answer, "choices"):
            return _attach(answer, _of_whole(client, answered, answer))
        return WatchedStream(answer, client, answered)

    return with_features


def _create_async(client: AsyncClient, answered: Answered, create: Any) -> Any:
    @functools.wraps(create)
    async def with_features(*args: Any, **kwargs: Any) -> Any:
        answer = await create(*args, **_with_secret(client.stream_secret, kwargs))
        if not isinstance(answer, _kinds()):
            return answer
        if hasattr(answer, "choices"):
            return _attach(answer, await _of_whole_async(client, answered, answer))
        return AsyncWatchedStream(answer, client, answered)

    return with_features


def _with_secret(stream_secret: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a request that bears it; what it asks of us besides stays."""
    if stream_secret is None:
        return kwargs
    body: dict[str, Any] = kwargs.get("extra_body") or {}
    xargs: dict[str, Any] = body.get("vllm_xargs") or {}
    options = {**json.loads(xargs.get(KEY, "{}")), "stream_secret": stream_secret}
    xargs = {**xargs, KEY: json.dumps(options)}
    return {**kwargs, "extra_body": {**body, "vllm_xargs": xargs}}


def _attach(answer: Any, features: list[TokenEvent] | None) -> Any:
    # Not as pydantic's extra field, which `model_dump_json` could not write.
    answer.__dict__["features"] = features
    return answer


def _of_whole(client: Client, answered: Answered, answer: Any) -> list[TokenEvent] | None:
    since, deadline = answer.created - CLOCK_S, time.monotonic() + WAIT_S
    try:
        while not answered.is_new(
            tokens := client.trace(answer.id, wait=WAIT_S, since=since).answer
        ):
            _check_time(deadline)
            time.sleep(POLL_S)
    except ServerError as error:
        return _without(answer.id, error)
    return tokens


async def _of_whole_async(
    client: AsyncClient, answered: Answered, answer: Any
) -> list[TokenEvent] | None:
    since, deadline = answer.created - CLOCK_S, time.monotonic() + WAIT_S
    try:
        while not answered.is_new(
            tokens := (await client.trace(answer.id, wait=WAIT_S, since=since)).answer
        ):
            _check_time(deadline)
            await asyncio.sleep(POLL_S)
    except ServerError as error:
        return _without(answer.id, error)
    return tokens


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise ServerError(LATE)


def _without(request_id: str, reason: object) -> None:
    logger.warning("neuroscope: the answer %s comes without features: %s", request_id, reason)


class WatchedStream:
    """An openai.Stream whose chunks have `features`; what else it has, too."""

    def __init__(self, stream: Any, client: Client, answered: Answered) -> None:
        self._stream = stream
        self._chunks = self._watched(client, answered)

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

    def _watched(self, client: Client, answered: Answered) -> Generator[Any]:
        reader: _Reader | None = None
        alignment = Alignment()
        try:
            for chunk in self._stream:
                reader = reader or _Reader(client, chunk, answered)
                alignment.said(chunk)
                yield _attach(chunk, reader.features(chunk, alignment))
        finally:
            if reader is not None:
                reader.close()


class Background:
    """A thread that reads streams for clients without a loop, so that waiting for one can end."""

    def __init__(self, client: Client) -> None:
        self.client = AsyncClient(client.url, client.api_key, client.stream_secret)
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

    def __init__(self, client: Client, chunk: Any, answered: Answered) -> None:
        self._request_id = chunk.id
        self._own, self._answered = Own(chunk, answered), answered
        self._events: queue.SimpleQueue[Event | ServerError] = queue.SimpleQueue()
        self._lost = False
        self._future: Future[None] | None = None
        try:
            background = client.background()
        except ServerError as error:
            self._events.put(error)
            return
        reading = _read(background.client, chunk.id, self._own, self._events.put)
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
        self._answered.add(self._own.names)
        if self._future is not None:
            self._future.cancel()


class AsyncWatchedStream:
    """An openai.AsyncStream whose chunks have `features`; what else it has, too."""

    def __init__(self, stream: Any, client: AsyncClient, answered: Answered) -> None:
        self._stream = stream
        self._chunks = self._watched(client, answered)

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

    async def _watched(self, client: AsyncClient, answered: Answered) -> AsyncGenerator[Any]:
        reader: _AsyncReader | None = None
        alignment = Alignment()
        try:
            async for chunk in self._stream:
                reader = reader or _AsyncReader(client, chunk, answered)
                alignment.said(chunk)
                yield _attach(chunk, await reader.features(chunk, alignment))
        finally:
            if reader is not None:
                reader.close()


class _AsyncReader:
    """Reads a request's stream in a task."""

    def __init__(self, client: AsyncClient, chunk: Any, answered: Answered) -> None:
        self._request_id = chunk.id
        self._own, self._answered = Own(chunk, answered), answered
        self._events: asyncio.Queue[Event | ServerError] = asyncio.Queue()
        self._lost = False
        reading = _read(client, chunk.id, self._own, self._events.put_nowait)
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
        self._answered.add(self._own.names)
        self._task.cancel()


async def _read(
    client: AsyncClient, request_id: str, own: Own, put: Callable[[Event | ServerError], None]
) -> None:
    """Put the answer's own events. Where the side process knows earlier requests of this id alone,
    their stream ends before it has heard of this one."""
    try:
        while not own.names:
            async for event in client.stream(request_id, include="token"):
                if own.has(event):
                    put(event)
            await asyncio.sleep(POLL_S)
        put(ServerError("its feature stream ended before it did"))
    except ServerError as error:
        put(error)
    except asyncio.CancelledError:
        put(ServerError("its client was closed"))  # or nobody listens any more
        raise
