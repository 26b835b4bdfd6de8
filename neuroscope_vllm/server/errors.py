"""Every error leaves as OpenAI's: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from msgspec.json import schema_components
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from neuroscope_vllm.core.events import ErrorBody, encoder

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}


class ApiError(Exception):
    """An answer other than 200. `message` says what was asked, why not, and what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after`: seconds, for one that will pass."""
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        self.body = ErrorBody(message, _TYPES.get(status, "server_error"), param, code)


def answer(error: ApiError) -> Response:
    content = encoder.encode({"error": error.body})
    return Response(content, error.status, error.headers, media_type="application/json")


class Json(JSONResponse):
    """What an engine says may hold NaN, which JSON writes as null."""

    def render(self, content: Any) -> bytes:
        return encoder.encode(content)


def document(app: FastAPI) -> None:
    """Have the OpenAPI document say what errors are, in place of FastAPI's own."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = generate()
            components = found.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            _, schemas = schema_components([ErrorBody], ref_template="#/components/schemas/{name}")
            components |= schemas
            for operation in (one for path in found["paths"].values() for one in path.values()):
                operation["responses"].pop("422", None)
                operation["responses"].setdefault("default", _ERROR)
        return generate()

    app.openapi = openapi


_ERROR = {
    "description": "An error, in OpenAI's form.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"error": {"$ref": "#/components/schemas/ErrorBody"}},
                "required": ["error"],
            }
        }
    },
}


def install(app: FastAPI) -> None:
    """Register the handlers that give every error this shape."""
    document(app)

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _bad_value(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        if first["type"] == "extra_forbidden":
            message = f"unknown parameter {param!r}; /docs lists the known ones."
        else:
            message = f"parameter {param!r} is {first.get('input')!r}: {first['msg']}."
        return answer(ApiError(400, message, param))

    @app.exception_handler(ClientDisconnect)
    async def _left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # for nobody; uvicorn would log a traceback of each

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; /docs lists what is here."
        return answer(ApiError(error.status_code, message))
