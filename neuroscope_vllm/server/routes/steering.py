"""PUT and DELETE /v1/requests/{request_id}/steering: steer a request that runs, or stop it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.steering.spec import SteeringSpec
from neuroscope_vllm.server.access import Caller
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.hub import Hub

_PARENT = re.compile(r"^\d+_")  # what vLLM puts before the id of a choice under n > 1

router = APIRouter(prefix="/v1/requests", tags=["requests"])


class Body(SteeringSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """As in `vllm_xargs.neuroscope`, without what is no steering."""


_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


@router.put("/{request_id:path}/steering", openapi_extra=_BODY)
async def change(request: Request, request_id: str) -> dict[str, Any]:
    """Steer all running choices of a request as the body says, in place of what was.

    The body is that of `vllm_xargs.neuroscope`: `{"steer": [...], "preset": ..., "rules": [...]}`.
    """
    try:
        asked = msgspec.json.decode(await request.body(), type=Body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(
            400,
            f"the body is no steering: {error}; give a JSON object as in"
            ' {"steer": [{"op": "add", "feature": 12, "value": 40}]}.',
        ) from None
    return await _steer(request, request_id, asked)


@router.delete("/{request_id:path}/steering")
async def stop(request: Request, request_id: str) -> dict[str, Any]:
    """Steer a request no more, but for the operator's rules; what it was steered to write stays in
    its context."""
    return await _steer(request, request_id, None)


async def _steer(request: Request, request_id: str, asked: SteeringSpec | None) -> dict[str, Any]:
    hub: Hub = request.app.state.hub
    caller: Caller = request.state.caller
    running = hub.running(request_id, caller.rights)
    if not running:
        known = bool(hub.traces.find(request_id, caller.rights))
        raise ApiError(
            409 if known else 404,
            f"request {request_id!r} {'has ended' if known else 'is not known here'}; only one that"
            " runs can be steered. GET /v1/requests lists what is kept.",
            "request_id",
        )
    parents = {_PARENT.sub("", internal_id) for internal_id, _ in running}
    if len(parents) > 1:
        raise ApiError(
            409,
            f"{len(parents)} running requests are called {request_id!r}; name one by its internal"
            f" id: {', '.join(sorted(parents)[:8])}.",
            "request_id",
        )
    answers = await asyncio.gather(*(_steer_one(hub, *one, asked) for one in running))
    if all(isinstance(one, ApiError) for one in answers):
        raise answers[0]  # pyright: ignore[reportGeneralTypeIssues]
    return {
        "request_id": request_id,
        "choices": [
            {"internal_id": internal_id, "error": one.body.message}
            if isinstance(one, ApiError)
            else {
                "internal_id": internal_id,
                "position": one.position,
                "steering": one.steering,
            }
            for (internal_id, _), one in zip(running, answers, strict=True)
        ],
    }


async def _steer_one(
    hub: Hub, internal_id: str, engine: str, asked: SteeringSpec | None
) -> wire.SteeringChanged | ApiError:
    try:
        changed = await hub.commands.steer(internal_id, engine, asked)
    except ConnectionError:
        return ApiError(503, "the engine can not be reached; try again in a second.")
    except TimeoutError:
        return ApiError(
            504, "the engine did not answer; the change may still come: watch the stream."
        )
    return changed if changed.error is None else ApiError(changed.status, changed.error)
