"""What stands before every route: who asks, from which page, and how much they send."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections import Counter

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuroscope_vllm.core.access import SECRET_HEADER
from neuroscope_vllm.server.access import Access, Caller, Need, Refusal, cookie_name, need_of
from neuroscope_vllm.server.errors import answer

logger = logging.getLogger(__name__)

MAX_HEAD = 1 << 16
MAX_BODY = 1 << 16
MAX_CHAT = 10 << 20
MAX_PARAMETERS = 64
"""FastAPI's time for a query grows with the square of them."""
MAX_COOKIE = 128
LOG_INTERVAL_S = 10.0
OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\]|::1)(:\d{1,5})?", re.IGNORECASE)
SESSION = "/v1/session"
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
"""On every answer that does not say otherwise."""
DOCS_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src https://cdn.jsdelivr.net 'unsafe-inline';"
    " style-src https://cdn.jsdelivr.net; img-src https://fastapi.tiangolo.com data:;"
    " frame-ancestors 'none'"
)
REFUSED = {
    "without_key": "for want of a key",
    "keys": "for a wrong key",
    "rights": "for a key that may not",
    "hosts": "as asked by another name than this machine's",
    "origins": "as asked by a page elsewhere",
    "secrets": "for too many secrets",
    "bodies": "for a body too large",
    "heads": "for headers too large",
    "malformed": "for what is no HTTP",
    "pipelined": "for too many requests before an answer",
    "slow": "for taking too long",
    "stuck": "more of an answer, of which nothing was taken",
}
"""What is refused, by kind, in the log's words."""


class Refusals:
    """Counts in the hub's counters, `refused_<kind>`, and says so in the log now and then."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._logged: dict[str, tuple[float, int]] = {}

    def add(self, kind: str, peer: str) -> None:
        """`peer`: the address of who was refused; what was asked may be user text."""
        name = f"refused_{kind}"
        self._counters[name] += 1
        logged_at, before = self._logged.get(kind, (float("-inf"), 0))
        if (now := time.monotonic()) - logged_at > LOG_INTERVAL_S:
            count = self._counters[name]
            self._logged[kind] = now, count
            text = "neuroscope: refused %s, the last from %s: %d since the last such line"
            logger.warning(text, REFUSED[kind], peer, count - before)


def install(app: FastAPI, access: Access, refusals: Refusals, allowed_origins: list[str]) -> None:
    """Guard everything that `app` serves, now and later."""

    @app.exception_handler(Refusal)
    async def _refused(request: Request, refusal: Refusal) -> Response:
        refusals.add(refusal.kind, _peer(request.scope))
        return answer(refusal)

    app.add_middleware(Guard, access=access, refusals=refusals, allowed_origins=allowed_origins)
    if allowed_origins:
        # Without cookies: who asks from elsewhere shows a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "last-event-id", "x-request-id", SECRET_HEADER],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(StrictHeaders)


class Guard:
    """Lets through what `Access` does; routes find the `Caller` in `request.state.caller`."""

    def __init__(
        self, app: ASGIApp, access: Access, refusals: Refusals, allowed_origins: list[str]
    ) -> None:
        self._app = app
        self._access = access
        self._refusals = refusals
        self._allowed_origins = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            scope = {**scope, "headers": _with_own_cookie(scope)}
            asked = HTTPConnection(scope)
            limit = MAX_CHAT if need_of(scope["path"]) is Need.CHAT else MAX_BODY
            try:
                _check_size(scope, asked.headers.get("content-length"), limit)
                self._check_host(asked)
                caller = self._access.caller(asked)
                self._check_origin(asked, caller)
            except Refusal as refusal:
                self._refusals.add(refusal.kind, _peer(scope))
                await answer(refusal)(scope, receive, send)
                return
            scope["state"] = {**scope.get("state", {}), "caller": caller}
            receive = self._bounded(scope, receive, limit)
        await self._app(scope, receive, send)

    def _bounded(self, scope: Scope, receive: Receive, limit: int) -> Receive:
        """Raises a Refusal where the application reads more than `limit` bytes. Where no body is
        wanted, the answer may have begun, and ends."""
        received = 0

        async def read() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received <= limit:
                return message
            refusal = _too_large(limit)
            if scope["method"] not in SAFE:
                raise refusal
            self._refusals.add(refusal.kind, _peer(scope))
            return {"type": "http.disconnect"}

        return read

    def _check_host(self, asked: HTTPConnection) -> None:
        """A page elsewhere could rebind its own name to this address and read the stream. Where
        there are keys it could not: keys and cookies of this server are unknown to its name."""
        if not self._access.keys and not OWN_HOST.fullmatch(asked.headers.get("host", "")):
            message = (
                "without keys this server answers to 127.0.0.1, localhost and [::1] alone, and was"
                " asked by another name; use one of these, or start it with a key."
            )
            raise Refusal("hosts", 400, message)

    def _check_origin(self, asked: HTTPConnection, caller: Caller) -> None:
        """What changes something must not be asked by a page elsewhere, but one that is allowed and
        shows a key; and a cookie must come from a browser that tells which page asks."""
        if asked.scope["method"] in SAFE:
            return
        origin, site = asked.headers.get("origin"), asked.headers.get("sec-fetch-site")
        by_cookie = caller.session is not None or asked.scope["path"] == SESSION
        if origin is not None and origin in self._allowed_origins and not by_cookie:
            return
        if site is not None:
            ours = site in ("same-origin", "none")
        elif origin is not None:
            ours = origin.partition("://")[2] == asked.headers.get("host")
        else:
            ours = caller.session is None
        if not ours:
            message = (
                "a page of another origin asks for this; name it in allowed_origins, and have it"
                " send a key and no cookie."
            )
            raise Refusal("origins", 403, message)


def _with_own_cookie(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The headers, but of cookies ours alone: those of other ports come along, FastAPI reads all
    for every route, and Python before 3.11.10 and 3.12.6 takes seconds for one of many
    backslashes."""
    ours = b"%b=" % cookie_name(scope).encode()
    given = (value for name, value in scope["headers"] if name == b"cookie")
    cookies = (one.strip() for value in given for one in value.split(b";"))
    kept = [one for one in cookies if one.startswith(ours) and len(one) <= MAX_COOKIE]
    headers = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
    return [*headers, (b"cookie", kept[-1])] if kept else headers


def _peer(scope: Scope) -> str:
    """An address, and no text: who asks from this machine may claim any in X-Forwarded-For."""
    host = (scope.get("client") or ("",))[0].partition("%")[0]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return "?"


def _check_size(scope: Scope, length: str | None, limit: int) -> None:
    head = sum(len(name) + len(value) for name, value in scope["headers"])
    if head + len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_HEAD:
        raise Refusal("heads", 431, f"path and headers have more than {MAX_HEAD} bytes.")
    if scope["query_string"].count(b"&") >= MAX_PARAMETERS:
        raise Refusal("heads", 431, f"the query has more than {MAX_PARAMETERS} parameters.")
    if length is not None and length.isdecimal() and int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> Refusal:
    return Refusal("bodies", 413, f"the body has more than {limit} bytes; give a smaller one.")


class StrictHeaders:
    """Puts HEADERS on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if scope["path"] == "/docs":
                    headers["content-security-policy"] = DOCS_POLICY
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, strict)
