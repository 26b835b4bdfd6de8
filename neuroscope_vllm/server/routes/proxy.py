"""Chat, completions and models, passed through to vLLM.

vLLM has CORS off by default, so a page served from here could not talk to it otherwise.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator

import anyio
import httpx
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from neuroscope_vllm.server.access import Caller
from neuroscope_vllm.server.errors import ApiError, answer
from neuroscope_vllm.server.readers import SHARE
from neuroscope_vllm.server.rights import Rights

FORWARDED = (
    "accept",
    "content-type",
    "traceparent",
    "tracestate",
    "x-request-id",
)
RETURNED = ("content-type", "retry-after", "www-authenticate", "x-request-id")
CONNECT_TIMEOUT_S = 5.0
MAX_PASSED = 1024
"""Requests that are with vLLM at the same time by way of us, or on their way here."""
MAX_PASSED_BYTES = 64 << 20
"""Of all their bodies."""
RETRY_AFTER_S = 1

logger = logging.getLogger(__name__)
router = APIRouter(tags=["pass-through to vLLM"])


def client(base_url: str) -> httpx.AsyncClient:
    """A client without a read timeout: a long prompt may take minutes to its first token."""
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=base_url, timeout=timeout, limits=limits, trust_env=False)


@router.get("/v1/models", response_class=Response)
@router.post("/v1/completions", response_class=Response)
@router.post("/v1/chat/completions", response_class=Response)
async def pass_through(request: Request) -> Response:
    """As vLLM answers it, chunk by chunk."""
    upstream: httpx.AsyncClient | None = request.app.state.upstream
    if upstream is None:
        raise ApiError(503, "this side process knows no vLLM server to pass requests to.")
    passed: Passed = request.app.state.passed
    given = {name: request.headers[name] for name in FORWARDED if name in request.headers}
    headers = {name.encode(): value.encode("latin-1") for name, value in given.items()}
    caller: Caller = request.state.caller
    if caller.authorization is not None:
        headers[b"authorization"] = caller.authorization.encode()
    headers[b"accept-encoding"] = b"identity"  # chunks are passed on as they come
    url = httpx.URL(path=request.url.path, query=request.url.query.encode())
    with contextlib.ExitStack() as holding:
        read = holding.enter_context(passed.place(caller.rights))
        body = b"".join([read(chunk) async for chunk in request.stream()])
        asked = upstream.build_request(request.method, url, headers=headers, content=body)
        return _Relayed(upstream, asked, holding.pop_all().close)


class Passed:
    """Room for MAX_PASSED requests and MAX_PASSED_BYTES, a quarter of both for a caller that is no
    admin; `passed_refused` counts the others."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._requests: Counter[bytes | None] = Counter()
        self._bytes: Counter[bytes | None] = Counter()

    @contextlib.contextmanager
    def place(self, rights: Rights) -> Iterator[Callable[[bytes], bytes]]:
        """One more. What is given takes note of a part of its body, and returns it. Both raise
        ApiError where there is no room."""
        who, size = rights.who, 0

        def take(of: Counter[bytes | None], more: int, limit: int, what: str) -> None:
            share = limit if who is None else limit // SHARE
            if of.total() + more > limit or of[who] + more > share:
                self._counters["passed_refused"] += 1
                message = f"{what} are passed through to vLLM already; ask it directly."
                raise ApiError(503, message, retry_after=RETRY_AFTER_S)
            of[who] += more

        def read(chunk: bytes) -> bytes:
            nonlocal size
            what = f"bodies of {MAX_PASSED_BYTES >> 20} MiB, a quarter of that with a user key,"
            take(self._bytes, len(chunk), MAX_PASSED_BYTES, what)
            size += len(chunk)
            return chunk

        what = f"{MAX_PASSED} requests, a quarter of that with a user key,"
        take(self._requests, 1, MAX_PASSED, what)
        try:
            yield read
        finally:
            for of, taken in ((self._requests, 1), (self._bytes, size)):
                of[who] -= taken
                if not of[who]:
                    del of[who]


class _Relayed(Response):
    """Asks upstream while it answers, so that a client who leaves cancels upstream's work, also
    before the first byte."""

    def __init__(
        self, upstream: httpx.AsyncClient, asked: httpx.Request, release: Callable[[], object]
    ) -> None:
        super().__init__()
        self._upstream = upstream
        self._asked = asked
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._pass(scope, receive, send)
        finally:
            self._release()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:

            async def relay() -> None:
                await self._relay(scope, receive, send)
                group.cancel_scope.cancel()

            group.start_soon(relay)
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._upstream.send(self._asked, stream=True)
        except httpx.HTTPError as error:
            message = (
                f"vLLM at {self._upstream.base_url} does not answer ({type(error).__name__});"
                " is it still loading the model?"
            )
            await answer(ApiError(502, message))(scope, receive, send)
            return
        try:
            headers = [
                (n.encode(), response.headers[n].encode())
                for n in RETURNED
                if n in response.headers
            ]
            status = response.status_code
            await send({"type": "http.response.start", "status": status, "headers": headers})
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.HTTPError as error:
            # Left unfinished, so that the client sees an answer cut short, not a short answer.
            logger.warning("neuroscope: vLLM broke off an answer (%s)", type(error).__name__)
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()
