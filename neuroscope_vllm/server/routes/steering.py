"""PUT and DELETE /v1/requests/{request_id}/steering: steer a request that runs, or stop it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from neuroscope_vllm.core.steering.asked import Asked
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.hub import Hub

MAX_BODY = 1 << 16

router = APIRouter(prefix="/v1/requests", tags=["requests"])


class Body(Asked, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """As in `vllm_xargs.neuroscope`, without what is no steering."""


@router.put("/{request_id:path}/steering")
async def change(request: Request, request_id: str) -> dict[str, Any]:
    """Steer all running choices of a request as the body says, in place of what was.

    The body is that of `vllm_xargs.neuroscope`: `{"steer": [...], "preset": ..., "rules": [...]}`.
    """
    content = await request.body()
    if len(content) > MAX_BODY:
        raise ApiError(413, f"the body has {len(content)} bytes; {MAX_BODY} are read.")
    try:
        asked = msgspec.json.decode(content, type=Body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(
            400,
            f"the body is no steering: {error}; give a JSON object as in"
            ' {"steer": [{"op": "add", "feature": 12, "value": 40}]}.',
        ) from None
    return await _steer(request, request_id, asked)


@router.delete("/{request_id:path}/steering")
async def stop(request: Request, request_id: str) -> dict[str, Any]:
    """Steer a request no more; what it was steered to write stays in its context."""
    return await _steer(request, request_id, None)


async def _steer(request: Request, request_id: str, asked: Asked | None) -> dict[str, Any]:
    hub: Hub = request.app.state.hub
    running = hub.running(request_id)
    if not running:
        known = bool(hub.traces.find(request_id))
        raise ApiError(
            409 if known else 404,
            f"request {request_id!r} {'has ended' if known else 'is not known here'}; only one that"
            " runs can be steered. GET /v1/requests lists what is kept.",
            "request_id",
        )
    try:
        changed = await asyncio.gather(*(hub.commands.steer(*one, asked) for one in running))
    except ConnectionError:
        raise ApiError(503, "the engine can not be reached; try again in a second.") from None
    except TimeoutError:
        raise ApiError(
            504, "the engine did not answer; the change may still come: watch the stream."
        ) from None
    for one in changed:
        if one.error is not None:
            raise ApiError(one.status, one.error)
    return {
        "request_id": request_id,
        "choices": [
            {
                "internal_id": one.internal_id,
                "position": one.position,
                "steering": one.steering,
            }
            for one in changed
        ],
    }
