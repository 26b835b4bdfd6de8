"""GET /health, /ready and /version."""

from __future__ import annotations

import time
from typing import Any

import httpx
from fastapi import APIRouter, Request, Response

from neuroscope_vllm.core.events import encoder
from neuroscope_vllm.core.wire import WIRE_VERSION
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.version import installed_version

UPSTREAM_TIMEOUT_S = 2.0

NOT_WELL: dict[int | str, dict[str, Any]] = {503: {"description": "The same, with `reasons`."}}

router = APIRouter(tags=["status"])


@router.get("/health", responses=NOT_WELL)
async def health(request: Request) -> Response:
    """200 when a live worker says that it is armed; else 503 with the reasons."""
    armed, body = _health(request)
    return _json(200 if armed else 503, body)


@router.get("/ready", responses=NOT_WELL)
async def ready(request: Request) -> Response:
    """200 when armed and vLLM's own /health answers, too."""
    armed, body = _health(request)
    problem = await _upstream_problem(request)
    if problem is not None:
        body["reasons"].append(problem)
    return _json(200 if armed and problem is None else 503, body)


@router.get("/version")
async def version() -> dict[str, Any]:
    return {"version": installed_version(), "wire_version": WIRE_VERSION}


def _health(request: Request) -> tuple[bool, dict[str, Any]]:
    hub: Hub = request.app.state.hub
    now = time.monotonic()
    if not request.app.state.listening:
        failure = request.app.state.failure
        reasons = [failure or "the side process is starting."]
        status = "degraded" if failure else "starting"
        return False, {"status": status, "armed": False, "reasons": reasons}
    armed = hub.senders.armed(now)
    reasons = hub.senders.problems(now)
    status = (
        "ok" if armed and not reasons else "degraded" if hub.senders.heard_worker else "starting"
    )
    return armed, {"status": status, "armed": armed, "reasons": reasons}


async def _upstream_problem(request: Request) -> str | None:
    upstream: httpx.AsyncClient | None = request.app.state.upstream
    if upstream is None:
        return None
    try:
        answer = await upstream.get("/health", timeout=UPSTREAM_TIMEOUT_S)
    except httpx.HTTPError as error:
        return f"vLLM at {upstream.base_url} does not answer ({type(error).__name__})."
    if answer.status_code != 200:
        return f"vLLM at {upstream.base_url} answers /health with {answer.status_code}."
    return None


def _json(status: int, body: Any) -> Response:
    return Response(encoder.encode(body), status, media_type="application/json")
