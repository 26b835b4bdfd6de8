"""GET /v1/features/stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from neuroscope_vllm.server.access import KEYLESS, Caller, not_an_admin
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.hub import MAX_ID, Hub
from neuroscope_vllm.server.readers import SHARE, TooManyOfOne, TooManyReaders
from neuroscope_vllm.server.rights import Rights
from neuroscope_vllm.server.sse import FeatureResponse
from neuroscope_vllm.server.view import TOKEN_EVENTS, View

RETRY_AFTER_S = 5

router = APIRouter(tags=["features"])


class StreamQuery(BaseModel):
    """What to stream. Unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid")

    request_id: str | None = Field(
        None, min_length=1, max_length=MAX_ID, description="One request, by any of its ids."
    )
    layer: int | None = Field(None, ge=0, description="Events of this layer only.")
    top_k: int | None = Field(None, ge=1, description="Fewer features than are configured.")
    dense: bool | None = Field(
        None,
        description="true: only features that fire on a tenth of all tokens; false: not those.",
    )
    include: str | None = Field(None, description="Comma-separated: prompt, token.")
    align: Literal["self", "predict"] = Field(
        "self", description="predict: each token with the features of the position before it."
    )
    format: Literal["openai"] | None = Field(
        None, description="openai: unnamed data lines, and [DONE] at the end."
    )
    last_event_id: str | None = Field(None, description="As the Last-Event-ID header.")


_FORMATS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events, until the request ends, or for ever.",
        "content": {"text/event-stream": {}, "application/x-ndjson": {}},
    },
    204: {"description": "Nothing is left to resume."},
}


@router.get("/v1/features/stream", response_class=Response, responses=_FORMATS)
async def stream_features(
    request: Request,
    query: Annotated[StreamQuery, Query()],
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Features of every token, live; of one request (replayed, then live, then it ends) or all.

    Server-sent events, or NDJSON with `Accept: application/x-ndjson`. 204: nothing is left to
    resume.
    """
    hub: Hub = request.app.state.hub
    caller: Caller = request.state.caller
    rights = caller.rights
    if query.request_id is None and not rights.lists:
        raise not_an_admin(rights, "the stream of all requests")
    view = _view(hub, query, "application/x-ndjson" in request.headers.get("accept", ""))
    resume = query.last_event_id or last_event_id
    epoch, after = _parse(resume) if resume else (None, None)
    restarted = epoch is not None and epoch != hub.epoch
    name = query.request_id
    if name is not None and resume and not restarted and _nothing_left(hub, name, after, rights):
        return Response(status_code=204)
    with admission(hub, rights):
        if name is None:
            reader = hub.subscribe_all(-1 if restarted else after, rights)
        else:
            reader = hub.subscribe(name, None if restarted else after, rights)
    if restarted:
        reader.tell_gap("restarted", None, None)
    return FeatureResponse(hub, reader, view, name)


@contextlib.contextmanager
def admission(hub: Hub, rights: Rights) -> Iterator[None]:
    """Says why, where a reader finds no place."""
    try:
        yield
    except TooManyOfOne:
        whose = "without a key" if rights.who == KEYLESS else "with this key"
        message = (
            f"as many streams are read {whose} as may be, 1/{SHARE} of max_readers"
            f" ({hub.settings.max_readers}); end one, or have the operator raise that."
        )
        raise ApiError(429, message, retry_after=RETRY_AFTER_S) from None
    except TooManyReaders:
        message = f"{hub.readers} streams are read, as many as max_readers allows; try again later."
        raise ApiError(503, message, retry_after=RETRY_AFTER_S) from None


def _view(hub: Hub, query: StreamQuery, ndjson: bool) -> View:
    limit = hub.settings.top_k
    if query.top_k is not None and query.top_k > limit:
        message = f"top_k is {query.top_k} but this server reports {limit} features per token."
        raise ApiError(400, message, "top_k")
    layers = [site.layer for site in hub.senders.sites()]
    if query.layer is not None and layers and query.layer not in layers:
        served = ", ".join(map(str, layers))
        raise ApiError(400, f"layer {query.layer} is not observed here; {served} is.", "layer")
    include = TOKEN_EVENTS
    if query.include is not None:
        include = frozenset(query.include.split(","))
        if unknown := include - TOKEN_EVENTS:
            message = f"include names {min(unknown)!r}; known are prompt and token."
            raise ApiError(400, message, "include")
    style = query.format or ("ndjson" if ndjson else "sse")
    return View(style, include, query.layer, query.top_k, query.align, query.dense)


def _parse(event_id: str) -> tuple[str, int]:
    epoch, _, seq = event_id.rpartition("-")
    if not epoch or not (seq.isascii() and seq.isdigit() and len(seq) < 19):
        message = f"last event id {event_id!r} is not one of ours, <epoch>-<number>."
        raise ApiError(400, message, "last_event_id")
    return epoch, int(seq)


def _nothing_left(hub: Hub, name: str, after: int | None, rights: Rights) -> bool:
    """Whether a returning reader has seen all there will be; EventSource stops on a 204."""
    return all(
        trace.finished_at is not None and after is not None and trace.after(after) == trace.end
        for trace in hub.traces.find(name, rights)
    )
