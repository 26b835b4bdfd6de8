"""GET /v1/requests and /v1/requests/{request_id}: what is kept of past and running requests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from neuroscope_vllm.core.events import GapEvent, encoder
from neuroscope_vllm.server.access import Caller
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.routes.stream import admission
from neuroscope_vllm.server.sse import LongResponse
from neuroscope_vllm.server.traces import Trace
from neuroscope_vllm.server.view import named_json

RECENT = 100
PIECE = 64
"""Events, of a kilobyte or so."""

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
    """All kept events of all choices that bear this id. Takes a reader's place while it is sent."""
    hub: Hub = request.app.state.hub
    caller: Caller = request.state.caller
    pieces = kept(hub, caller, request_id)
    with admission(hub, caller.rights), contextlib.ExitStack() as holding:
        holding.enter_context(hub.place(caller.rights))
        return LongResponse(hub, pieces, holding.pop_all().close, "application/json")


def kept(hub: Hub, caller: Caller, request_id: str) -> Iterator[bytes]:
    """The answer in pieces, of what is kept now. Raises ApiError if that is nothing."""
    found = hub.traces.find(request_id, caller.rights)
    if not found:
        raise ApiError(
            404,
            f"request {request_id!r} is not kept here; use the `id` of vLLM's answer or the"
            " X-Request-Id you sent, soon after. GET /v1/requests lists what is kept.",
            "request_id",
        )
    found.sort(key=lambda trace: (trace.created, trace.choice))
    return _pieces([(trace, trace.end, _summary(trace)) for trace in found])


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


def _pieces(choices: list[tuple[Trace, int, dict[str, Any]]]) -> Iterator[bytes]:
    """Of each trace, up to an end. What it holds is not held here: it may go while this is sent."""
    yield b'{"choices":['
    for number, (trace, end, summary) in enumerate(choices):
        yield b'%b%b,"events":[' % (b"," if number else b"", encoder.encode(summary)[:-1])
        at, comma = trace.first, b""
        while at < end:
            if at < trace.first:
                lost = min(trace.first, end) - at
                gap = encoder.encode(GapEvent("evicted", count=lost))
                piece, at = b'{"event":"gap",%b' % gap[1:], at + lost
            else:
                kept = trace.read(at, min(PIECE, end - at))
                piece, at = b",".join(map(named_json, kept)), at + len(kept)
            yield comma + piece
            comma = b","
        yield b"]}"
    yield b"]}"
