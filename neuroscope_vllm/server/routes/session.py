"""POST and DELETE /v1/session: a cookie for browsers, in place of a key in every request."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response

from neuroscope_vllm.core.access import SECRET_FORM, SECRET_PATTERN
from neuroscope_vllm.server.access import Access, Caller, cookie_name
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.sessions import LASTS_S

router = APIRouter(prefix="/v1/session", tags=["session"])


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    api_key: str | None = None
    stream_secret: Annotated[str, msgspec.Meta(pattern=SECRET_PATTERN)] | None = None


@router.post("", status_code=204)
async def begin(request: Request) -> Response:
    """Sign in with `{"api_key": ..., "stream_secret": ...}`, or one of them; more of them add to
    what the browser has."""
    try:
        body = msgspec.json.decode(await request.body(), type=Body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(
            400, f"the body is no sign-in: {error}; give api_key, or a stream_secret that"
            f" {SECRET_FORM}."
        ) from None  # fmt: skip
    access: Access = request.app.state.access
    caller: Caller = request.state.caller
    session = access.sign_in(caller.session, body.api_key, body.stream_secret)
    access.sessions.end(request.cookies.get(cookie_name(request.scope)))
    response = Response(status_code=204)
    response.set_cookie(
        cookie_name(request.scope),
        access.sessions.begin(session),
        max_age=LASTS_S,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


@router.delete("", status_code=204)
async def end(request: Request) -> Response:
    """Sign out. Streams that are open go on to their end."""
    access: Access = request.app.state.access
    access.sessions.end(request.cookies.get(cookie_name(request.scope)))
    response = Response(status_code=204)
    response.delete_cookie(cookie_name(request.scope), httponly=True, samesite="strict")
    return response
