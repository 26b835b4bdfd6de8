"""The client of a running server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from httpx_sse import connect_sse

from neuroscope_vllm.client import calls
from neuroscope_vllm.client.calls import Call, Steering
from neuroscope_vllm.client.following import PATH, PATIENCE_S, RETOLD_S, Event, Following
from neuroscope_vllm.client.records import Card, Described, Label, Steered
from neuroscope_vllm.client.trace import Trace
from neuroscope_vllm.core.config import API_KEY_VARIABLE

if TYPE_CHECKING:
    from openai import OpenAI

    from neuroscope_vllm.client.wrap import Background

T = TypeVar("T")
OpenAIClient = TypeVar("OpenAIClient", bound="OpenAI")

POLL_S = 0.05
TRACE_WAIT_S = 30.0


class Client:
    """A server's feature stream, and what it knows of requests and features.

        client = Client()
        for event in client.stream("my-chat"):
            if isinstance(event, TokenEvent):
                print(event.token, event.top_features[:3])

    What the server refuses, or that it does not answer, is a ServerError of one sentence, from
    every method. May be shared by threads. Close it, or use it as a context manager.

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
            self._http = httpx.Client(
                base_url=self.url, **calls.http_options(api_key, stream_secret)
            )
        self.features = Features(self)
        self._described: Described | None = None
        self._background: Background | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Streams that others still read end with the next that comes."""
        with self._lock:
            self._http.close()
            if self._background is not None:
                self._background.close()
                self._background = None

    def stream(
        self, request_id: str | None = None, *, patience: float = PATIENCE_S, **view: Any
    ) -> Iterator[Event]:
        """Events as they come: of one request from its begin to its end, or of all from now on.

        A stream that breaks off is resumed where it was, also when the side process was started
        again: nothing comes twice, and what is missing is a GapEvent. A request may be streamed
        before it is sent.

        Args:
            request_id: Any id of the request: that of the answer, or the X-Request-Id sent.
            patience: Seconds for which to try again when a stream that was there is not.
            view: As in the stream's query: layer, top_k, dense, include, align.

        Raises ServerError: as said above, at the first `next`.
        """
        self._check_open()
        following = Following(self.url, request_id, view, patience)
        while True:
            try:
                asked = following.request()
                with connect_sse(self._http, "GET", PATH, **asked) as got:
                    if got.response.status_code != 200:
                        got.response.read()
                    if not following.connected(got.response):
                        return
                    for sse in got.iter_sse():
                        if (event := following.hear(sse)) is not None:
                            yield event
                        if following.lost:
                            self._wait_retold(following)
                if following.over():
                    return
            except httpx.TransportError as error:
                following.broke(error)
            time.sleep(following.pause())
            if self._http.is_closed:
                return

    def trace(self, request_id: str, *, wait: float = TRACE_WAIT_S, since: float = 0.0) -> Trace:
        """All that is kept of a request.

        The features of an answer's last tokens may come a moment after the answer, so this waits
        for the request's end, for `wait` seconds at most; 0: tell what is known now.

        Args:
            since: Of requests with the same id, those that began then or later, unix seconds.
        """
        special = self.describe().special_token_ids
        deadline = time.monotonic() + wait
        while True:
            response = self._get(f"/v1/requests/{calls.quoted(request_id)}")
            late = time.monotonic() >= deadline
            # 404: the side process has not heard of it yet.
            if response.status_code != 404 or late:
                with calls.reached(self.url):
                    trace = Trace.decode(calls.checked(response), special, since)
                if trace is not None and (trace.finished or late):
                    return trace
                if late:
                    raise calls.not_since(request_id)
            time.sleep(POLL_S)

    def inspect(self, text: str, chat: bool = False) -> Trace:
        """The features of a text, from the server's model; without an answer.

        Args:
            text: What the model reads.
            chat: It is a user's message, and goes through the chat template.
        """
        request_id = self._ask(calls.inspect(text, chat, self.describe().model, self.stream_secret))
        return self.trace(request_id).prompts_only()

    def steer(self, request_id: str, spec: Steering | None) -> Steered:
        """Steer a request that runs from now on as `spec` says, in place of what was; None: no
        more.

        Args:
            spec: As in `vllm_xargs.neuroscope`: {"steer": [...], "preset": ..., "rules": [...]}.
        """
        return self._ask(calls.steer(request_id, spec))

    def wrap(self, openai: OpenAIClient) -> OpenAIClient:
        """A copy of an OpenAI client whose chat and text completions carry their features.

        Each answer, and each chunk of a streamed one, has `features`: a TokenEvent for each of its
        tokens and observed layers. A chunk's tokens are those whose text it completes, so the
        texts of both, joined, are the same; characters made of several tokens, stop strings and
        n > 1 included. Where a parser of vLLM's takes tool calls or reasoning out of the text,
        or `echo` puts a prompt before it, tokens come with the chunk that is due when they are
        known. Chunks wait for their features, about a step of the model.

        `features` is None where they did not come within 10 s, the server is away, or several
        requests bear the answer's id at the same time: no answer fails or ends for want of them.

        `create`, `parse` and `stream` have them, and copies made by `with_options`; raw responses
        and the Responses API do not. Type checkers do not know the attribute; `features_of` returns
        it typed, and None where there is none.

        Args:
            openai: openai.OpenAI with `base_url` at vLLM's port or ours.
        """
        from neuroscope_vllm.client.wrap import wrapped

        return wrapped(self, openai)

    def background(self) -> Background:
        """The thread that reads streams for wrapped clients; started when first asked for.

        Raises ServerError: This client was closed, and the thread with it.
        """
        from neuroscope_vllm.client.wrap import Background

        with self._lock:
            self._check_open()
            if self._background is None:
                self._background = Background(self)
            return self._background

    def describe(self) -> Described:
        """What the server observes: model, layers, SAEs. Asked once, when its engine is there."""
        if self._described is None or not self._described.sites:
            self._described = self._ask(calls.describe())
        return self._described

    def _ask(self, call: Call[T]) -> T:
        self._check_open()
        with calls.reached(self.url):
            response = self._http.request(
                call.method, call.path, params=call.params, json=call.body, headers=call.headers
            )
            return call.parse(calls.checked(response))

    def _get(self, path: str) -> httpx.Response:
        self._check_open()
        with calls.reached(self.url):
            return self._http.get(path)

    def _check_open(self) -> None:
        """Raises ServerError: This client was closed."""
        if self._http.is_closed:
            raise calls.closed(self.url)

    def _wait_retold(self, following: Following) -> None:
        """Raises ServerError: nothing is known of the request any more."""
        assert following.request_id is not None
        path = f"/v1/requests/{calls.quoted(following.request_id)}"
        deadline = time.monotonic() + RETOLD_S
        while self._http.get(path).status_code == 404:
            if time.monotonic() > deadline:
                raise following.forgotten()
            time.sleep(POLL_S)
        following.lost = False


class Features:
    """What features mean."""

    def __init__(self, client: Client) -> None:
        self._ask = client._ask  # pyright: ignore[reportPrivateUsage]

    def get(self, index: int, layer: int | None = None) -> Card:
        """The feature's card; `layer` may be left out where one is served. The first one takes a
        second or more, as weights are read."""
        return self._ask(calls.card(index, layer))

    def search(
        self,
        q: str | None = None,
        *,
        index: int | None = None,
        layer: int | None = None,
        labeller: str | None = None,
        limit: int = 20,
    ) -> list[Label]:
        """Labels that hold every word of `q`, best first; all of a feature with `index` alone."""
        query = {"index": index, "layer": layer, "labeller": labeller, "limit": limit}
        return self._ask(calls.labels(q, **query))
