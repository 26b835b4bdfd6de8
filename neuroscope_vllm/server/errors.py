"""Every error leaves as OpenAI's: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from neuroscope_vllm.core.events import ErrorBody, encoder

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    431: "invalid_request_error",
}


class ApiError(Exception):
    """An answer other than 200. `message` says what was asked, why not, and what to do."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, _TYPES.get(status, "server_error"), param, code)


def answer(error: ApiError) -> Response:
    content = encoder.encode({"error": error.body})
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return Response(content, error.status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Register the handlers that give every error this shape."""

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

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; /docs lists what is here."
        return answer(ApiError(error.status_code, message))
