"""The server of `transformers serve`, with what is around vLLM's: keys, origins, errors, ids."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving.server import build_server

from neuroscope_vllm.core.access import digest, is_among
from neuroscope_vllm.engine.hf.serve.answering import Served
from neuroscope_vllm.engine.hf.serve.answers import error_body
from neuroscope_vllm.engine.hf.serve.ask import Refused
from neuroscope_vllm.engine.hf.serve.handlers import ChatHandler, TextHandler, names_itself

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
"""Of transformers' own; those that load, unload or speak to other models are left out."""
GUARDED = ("/v1", "/load")
"""What needs a key: as in vLLM, and what tells of the requests of others."""


def build(served: Served, *, api_keys: Sequence[str], origins: Sequence[str]) -> FastAPI:
    # Which handlers there are differs by version; those of other routes are not needed.
    given: dict[str, Any] = {
        "model_manager": served.manager,
        "chat_handler": ChatHandler(served),
        "completion_handler": TextHandler(served),
        "generation_state": served.state,
    }
    build_theirs: Any = build_server
    known = inspect.signature(build_theirs).parameters
    needed = [name for name, one in known.items() if one.default is one.empty]
    app: FastAPI = build_theirs(**{name: given.get(name) for name in {*given, *needed}})
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", "") in ROUTES
    ]
    _say_who(app, served, ids=not api_keys)
    _install_errors(app)
    app.add_middleware(_Cancelling)
    if api_keys:
        app.add_middleware(_Keys, keys=api_keys)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(_NoCookies)
    return app


def _say_who(app: FastAPI, served: Served, ids: bool) -> None:
    """What the page and the command line ask for beside answers. `ids`: also of what runs and
    waits; with a key one could read the features of each request that one can name."""
    models = [route for route in app.router.routes if getattr(route, "path", "") == "/v1/models"]
    for route in models:
        app.router.routes.remove(route)

    @app.get("/v1/models")
    def models_served() -> dict[str, Any]:
        card = {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "neuroscope",
            "root": served.name,
            "parent": None,
            "max_model_len": served.generator.max_model_len,
        }
        return {"object": "list", "data": [card]}

    @app.get("/version")
    def versions() -> dict[str, str]:
        return {"version": version("neuroscope-vllm"), "transformers": version("transformers")}

    @app.get("/load")
    def load() -> dict[str, Any]:
        queue = served.generator.queue()
        return {"server_load": len(queue), **({"queue": queue} if ids else {})}


def _install_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> Response:
        return JSONResponse(error_body(error), error.status)

    @app.exception_handler(RequestValidationError)
    async def _no_json(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(
            error_body(Refused(f"the body is no JSON object: {_first(error)}")), 400
        )

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if error.status_code in (404, 405):
            known = ", ".join(ROUTES)
            detail = f"{request.method} {request.url.path}: {detail}; here are {known}."
        refused = Refused(detail, None, error.status_code)
        return JSONResponse(error_body(refused), error.status_code)

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> Response:
        said = f"the server failed on it ({type(error).__name__}); its log has the trace."
        return JSONResponse(error_body(Refused(said, None, 500)), 500)


def _first(error: RequestValidationError) -> str:
    first = error.errors()[0]
    return str(first.get("ctx", {}).get("error", first["msg"]))


class _NoCookies:
    """There are none of ours, but FastAPI reads all for every route, and Python before 3.11.10 and
    3.12.6 takes seconds for one of many backslashes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            kept = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


class _Keys:
    """Asks for one of the keys, as vLLM's middleware does; compares in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = list(map(digest, keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(GUARDED)
        if guarded and scope["method"] != "OPTIONS" and not self._admits(Headers(scope=scope)):
            refused = JSONResponse({"error": "Unauthorized"}, 401)
            await refused(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return is_among(digest(key), self._digests) and scheme.lower() == "bearer"


class _Cancelling:
    """A request whose client has left is cancelled, streamed or not; and `names_itself` is set."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        names_itself.set(bool(Headers(scope=scope).get("x-request-id")))
        body: list[Message] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body.append(message)
            if not message.get("more_body"):
                break
        left = asyncio.Event()

        async def replayed() -> Message:
            if body:
                return body.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            answering.cancel()

        answering = asyncio.ensure_future(self._app(scope, replayed, send))
        watching = asyncio.ensure_future(watch())
        try:
            await answering
        except asyncio.CancelledError:
            if not left.is_set():
                raise
        finally:
            watching.cancel()
