"""GET /v1/requests and /v1/requests/{request_id}: what is kept of past and running requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from neuroscope_vllm.core.events import encoder
from neuroscope_vllm.server.access import Caller
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.traces import Trace
from neuroscope_vllm.server.view import named_json

RECENT = 100

router = APIRouter(prefix="/v1/requests", tags=["requests"])


@router.get("")
async def recent(request: Request) -> dict[str, Any]:
    """The latest requests kept, newest first."""
    hub: Hub = request.app.state.hub
    caller: Caller = request.state.caller
    traces = [trace for trace in hub.traces if caller.rights.may_read(trace.secret)]
    traces.sort(key=lambda trace: trace.created, reverse=True)
    return {"data": [_summary(trace) for trace in traces[:RECENT]], "total": len(traces)}


@router.get("/{request_id:path}")
async def trace(request: Request, request_id: str) -> Response:
    """All kept events of all choices that bear this id."""
    hub: Hub = request.app.state.hub
    caller: Caller = request.state.caller
    found = hub.traces.find(request_id, caller.rights)
    if not found:
        raise ApiError(
            404,
            f"request {request_id!r} is not kept here; use the `id` of vLLM's answer or the"
            " X-Request-Id you sent, soon after. GET /v1/requests lists what is kept.",
            "request_id",
        )
    found.sort(key=lambda trace: (trace.created, trace.choice))
    choices = b",".join(_choice(trace) for trace in found)
    return Response(b'{"choices":[%b]}' % choices, media_type="application/json")


def _summary(trace: Trace) -> dict[str, Any]:
    return {
        "request_id": trace.request_id,
        "internal_id": trace.internal_id,
        "choice": trace.choice,
        "created": trace.created,
        "finished": trace.finished_at is not None,
        "events_total": trace.end,
        "events_kept": trace.end - trace.first,
    }


def _choice(trace: Trace) -> bytes:
    head = encoder.encode(_summary(trace))
    kept = trace.read(trace.first, trace.end - trace.first)
    return b'%b,"events":[%b]}' % (head[:-1], b",".join(map(named_json, kept)))
