"""Requests and what their answers mean, without doing them: both clients share this."""

from __future__ import annotations

import json
import urllib.parse
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import httpx
import msgspec

from neuroscope_vllm.client.records import Card, Described, Label, LabelPage, Steered
from neuroscope_vllm.core.access import SECRET_HEADER
from neuroscope_vllm.core.errors import ServerError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 300.0
"""A long text is inspected, or a card's weights are read, in less."""
Steering = Mapping[str, Any]
"""As in `vllm_xargs.neuroscope`: {"steer": [{"op": "add", "feature": 12, "value": 40}]}."""


class Call(NamedTuple, Generic[T]):
    """A request, and how its answer is read."""

    method: str
    path: str
    parse: Callable[[bytes], T]
    params: dict[str, Any] = {}  # noqa: RUF012
    body: Any = None
    headers: dict[str, str] = {}  # noqa: RUF012


class _Refused(msgspec.Struct):
    """OpenAI's error object, of ours or of vLLM, whose code is a number."""

    message: str
    param: str | None = None
    code: str | int | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _Refused


class _Said(msgspec.Struct):
    id: str


def http_options(api_key: str | None, stream_secret: str | None = None) -> dict[str, Any]:
    """What both kinds of httpx clients take."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    if stream_secret:
        headers[SECRET_HEADER] = stream_secret
    return {
        "headers": headers,
        "timeout": httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=None),
        "limits": httpx.Limits(max_connections=None),
    }


def describe() -> Call[Described]:
    return Call("GET", "/v1/features/describe", _as(Described))


def card(index: int, layer: int | None) -> Call[Card]:
    return Call("GET", f"/v1/features/{index}", _as(Card), params=_given(layer=layer))


def labels(q: str | None, **query: Any) -> Call[list[Label]]:
    def parse(content: bytes) -> list[Label]:
        return msgspec.json.decode(content, type=LabelPage).data

    return Call("GET", "/v1/features/labels", parse, params=_given(q=q, **query))


def steer(request_id: str, spec: Steering | None) -> Call[Steered]:
    method = "DELETE" if spec is None else "PUT"
    return Call(method, f"/v1/requests/{quoted(request_id)}/steering", _as(Steered), body=spec)


def inspect(text: str, chat: bool, model: str, stream_secret: str | None) -> Call[str]:
    """The text as a prompt; the answer is the id of its trace."""
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0}
    # What vLLM has in its prefix cache would come without the features of this run.
    options = _given(prompt_features="all", stream_secret=stream_secret)
    body["vllm_xargs"] = {"neuroscope": json.dumps(options)}
    if chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
    else:
        path, body["prompt"] = "/v1/completions", text
    headers = {"X-Request-Id": f"inspect-{uuid.uuid4().hex}"}

    def parse(content: bytes) -> str:
        return msgspec.json.decode(content, type=_Said).id

    return Call("POST", path, parse, body=body, headers=headers)


def quoted(request_id: str) -> str:
    """For a path. The server takes slashes as they are; httpx would take `..` for a way up."""
    return urllib.parse.quote(request_id, errors="surrogatepass").replace(".", "%2E")


def checked(response: httpx.Response) -> bytes:
    """The body of an answer that was read.

    Raises ServerError: It is no 200.
    """
    if response.status_code == 200:
        return response.content
    raise refusal(response)


def refusal(response: httpx.Response) -> ServerError:
    """Why, in the server's own sentence where it has one."""
    status = response.status_code
    hint = "; give its key as api_key" if status in (401, 403) else ""
    try:
        said = msgspec.json.decode(response.content, type=_ErrorAnswer).error
    except msgspec.MsgspecError:
        asked = f"{response.request.method} {response.url} was answered with {status}"
        hint = hint or "; give the URL of a neuroscope server's features port"
        return ServerError(f"{asked} ({response.reason_phrase or 'no reason'}){hint}.", status)
    code = said.code if isinstance(said.code, str) else None
    return ServerError(" ".join(said.message.split()) + hint, status, said.param, code)


@contextmanager
def reached(url: str) -> Generator[None]:
    """Raises ServerError in place of what httpx raises."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise ServerError(
            f"{url} can not be sent characters that are no {error.encoding} ({error.reason}); give"
            " ids and texts in Unicode, and a key in ASCII."
        ) from None
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise unreachable(url, error) from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ServerError(f"{url} is no URL of a server ({error}).") from None
    except httpx.HTTPError as error:
        raise ServerError(
            f"the server at {url} broke off ({type(error).__name__}); see its log."
        ) from None
    except msgspec.MsgspecError as error:
        raise ServerError(
            f"the server at {url} answered with something unknown ({error}); it is no neuroscope"
            " server, or one of another version."
        ) from None


def not_since(request_id: str) -> ServerError:
    return ServerError(
        f"of request {request_id!r} only earlier ones are kept here; use the engine's id, or an"
        " X-Request-Id once."
    )


def closed(url: str) -> ServerError:
    return ServerError(f"the client of {url} was closed; make another, or close it later.")


def unreachable(url: str, error: Exception) -> ServerError:
    return ServerError(
        f"no feature stream answers at {url} ({type(error).__name__}); start a server with"
        " `neuroscope serve`, or give the URL of its features port."
    )


def _as(kind: type[T]) -> Callable[[bytes], T]:
    return lambda content: msgspec.json.decode(content, type=kind)


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
