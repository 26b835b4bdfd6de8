"""Where a reader of the stream is: what it asks for next, and what it has told already.

Both clients drive one of these; it does no I/O. Server-sent events and not NDJSON, because only
they keep a silent connection alive with comments, so that one that died is noticed.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from typing import Any

import httpx
import msgspec
from httpx_sse import ServerSentEvent, SSEError

from neuroscope_vllm.client import calls
from neuroscope_vllm.core import events
from neuroscope_vllm.core.errors import ServerError

logger = logging.getLogger(__name__)

PATH = "/v1/features/stream"
SILENCE_S = 45.0
"""Three keep-alives that did not come: the connection is dead."""
TIMEOUT = httpx.Timeout(10.0, read=SILENCE_S, pool=None)
PATIENCE_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
RETOLD_S = 20.0
"""How long engines may take to tell a side process that was started again what runs."""
REMEMBERED = 2048
"""Choices that are known to be told, so that they are not told twice."""

Event = (
    events.RequestEvent
    | events.TokenEvent
    | events.RuleEvent
    | events.SteeringEvent
    | events.GapEvent
    | events.DoneEvent
    | events.ErrorEvent
    | events.GoodbyeEvent
)
_decoders = {name: msgspec.json.Decoder[Any](kind) for name, kind in events.EVENTS.items()}


class Following:
    """One reader's place in the stream.

    Attributes:
        lost: The side process was started again; whether it will tell of this reader's request
            anew is to be found out.
    """

    def __init__(
        self, url: str, request_id: str | None, view: dict[str, Any], patience: float
    ) -> None:
        """`patience`: seconds without a connection after which to give up."""
        self.request_id = request_id
        self.lost = False
        self._url = url
        given = {"request_id": request_id, **view}
        self._params = {n: _plain(value) for n, value in given.items() if value is not None}
        with calls.reached(url):  # not while connecting, where all errors are tried again
            str(httpx.QueryParams(self._params))
        self._patience = patience
        self._last_id = ""
        self._told = _Told()
        self._connected_at: float | None = None
        self._pause = FIRST_PAUSE_S
        self._goodbye = False
        self._cause: Exception | None = None

    def request(self) -> dict[str, Any]:
        """Arguments of httpx for the next connection."""
        headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
        return {"params": self._params, "headers": headers, "timeout": TIMEOUT}

    def connected(self, response: httpx.Response) -> bool:
        """Whether there is something to read; the body of an error is read already.

        Raises:
            ServerError: It refuses what is asked for.
            SSEError: It can not answer now.
        """
        if response.status_code == 204:
            return False
        passing = response.status_code >= 500 or response.status_code == 429
        if passing and self._connected_at is not None:
            raise SSEError(f"status {response.status_code}")  # the next may be better
        if response.status_code != 200:
            raise calls.refusal(response)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise SSEError("no event stream")
        if self._cause is not None:
            logger.info("neuroscope: connected to %s again", self._url)
        self._cause, self._goodbye = None, False
        self._connected_at = time.monotonic()
        self._pause = FIRST_PAUSE_S
        return True

    def hear(self, sse: ServerSentEvent) -> Event | None:
        """The next event; None: there is nothing that was not told.

        Raises ServerError: It is no event of ours.
        """
        self._connected_at = time.monotonic()
        decoder = _decoders.get(sse.event)
        if decoder is None or not sse.data:
            return None
        self._last_id = sse.id or self._last_id
        with calls.reached(self._url):
            event: Event = decoder.decode(sse.data)
        if isinstance(event, events.GoodbyeEvent):
            self._goodbye = True
        elif isinstance(event, events.GapEvent) and event.reason == "restarted":
            self._told.again = True
            self.lost = self.request_id is not None and self._told.began
        return self._told.fresh(event)

    def over(self) -> bool:
        """The stream ended as streams end: is there no more to come?"""
        if self.request_id is None or self._goodbye:
            return False
        return self._told.began and not self._told.running

    def broke(self, error: httpx.TransportError) -> None:
        """The connection did. Raises ServerError where there never was one."""
        if self._connected_at is None and isinstance(error, SSEError):
            raise ServerError(
                f"{self._url} is no neuroscope server: it answers {PATH} with something that is no"
                " event stream; give the URL of its features port."
            )
        if self._connected_at is None:
            with calls.reached(self._url):
                raise error
        if self._cause is None:
            logger.info(
                "neuroscope: the stream of %s broke off (%s)", self._url, type(error).__name__
            )
        self._cause = error

    def pause(self) -> float:
        """Seconds until the next connection.

        Raises:
            ServerError: There was none for too long.
        """
        assert self._connected_at is not None
        if time.monotonic() - self._connected_at > self._patience:
            raise ServerError(
                f"the feature stream of {self._url} did not come back within {self._patience:g} s"
                f" ({type(self._cause).__name__ if self._cause else 'it ends at once'}); see the"
                " server's log."
            )
        pause, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE_S)
        return pause

    def forgotten(self) -> ServerError:
        """The side process that was started again knows nothing of this request."""
        return ServerError(
            f"the side process at {self._url} was started again and does not know request"
            f" {self.request_id!r}, which ended meanwhile or ran in an engine that is gone; its"
            " features are lost."
        )


class _Choice:
    """What a reader was told of one that runs.

    Attributes:
        introduced: Its RequestEvent.
        reached: The last position, by layer; None: a token of which no layer was known, and which
            is told for all of them.
    """

    def __init__(self) -> None:
        self.introduced = False
        self.reached: dict[int | None, int] = {}

    @property
    def furthest(self) -> int:
        return max(self.reached.values(), default=-1)

    def knows(self, token: events.TokenEvent) -> bool:
        if token.layer is None:
            return token.position <= self.furthest
        return token.position <= max(self.reached.get(token.layer, -1), self.reached.get(None, -1))

    def rest(self, event: Event) -> Event | None:
        """What is new of an event that may have been told."""
        match event:
            case events.RequestEvent():
                return None if self.introduced else event
            case events.TokenEvent():
                return None if self.knows(event) else event
            case events.RuleEvent():
                return event if event.position > self.furthest else None
            case events.GapEvent(start=int(start), stop=int(stop)):
                start = max(start, self.furthest + 1)
                if start >= stop:
                    return None
                return msgspec.structs.replace(event, start=start, count=stop - start)
            case _:
                return event


class _Told:
    """What a reader was told, so that nothing that is told again comes twice.

    Attributes:
        again: The server may tell again what it told.
        began: Something was told.
    """

    def __init__(self) -> None:
        self.again = False
        self.began = False
        self._running: OrderedDict[str, _Choice] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    @property
    def running(self) -> bool:
        return bool(self._running)

    def fresh(self, event: Event) -> Event | None:
        """The event, or what of it was not told."""
        name = getattr(event, "internal_id", None)
        if not isinstance(name, str):
            return event
        self.began = True
        if name in self._ended:
            return None if self.again else event
        if isinstance(event, events.DoneEvent):
            self._running.pop(name, None)
            _remember(self._ended, name, None)
            return event
        if name not in self._running:
            _remember(self._running, name, _Choice())
        choice = self._running[name]
        new = choice.rest(event) if self.again else event
        if isinstance(new, events.TokenEvent):
            choice.reached[new.layer] = new.position
        elif isinstance(new, events.RequestEvent):
            choice.introduced = True
        return new


def _remember(into: OrderedDict[str, Any], name: str, value: Any) -> None:
    into[name] = value
    if len(into) > REMEMBERED:
        into.popitem(last=False)


def _plain(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
