"""GET /v1/features/labels, /v1/features/describe and /v1/features/{index}."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from neuroscope_vllm.core.cards.record import Card, Neighbour, Wanted
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.detokenize import special_ids
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.wire import Site
from neuroscope_vllm.server.access import Access, Caller
from neuroscope_vllm.server.cards import CardError, CardReader
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.senders import MAX_SENDERS

router = APIRouter(prefix="/v1/features", tags=["features"])


class LabelQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    labeller: str | None = None
    layer: int | None = Field(None, ge=0)
    q: str | None = Field(None, description="Words to search for.")
    index: int | None = Field(None, ge=0)
    limit: int = Field(100, ge=1, le=1000)
    offset: int = Field(0, ge=0)


@router.get("/labels")
def labels(request: Request, query: Annotated[LabelQuery, Query()]) -> dict[str, Any]:
    """Labels of features, by labeller, layer, words or index, with where they come from.

    A null score means that nobody scored the label."""
    hub: Hub = request.app.state.hub
    sets = _label_sets(hub)
    labellers = {one.labeller for _, one in sets}
    if query.labeller is not None and query.labeller not in labellers:
        known = ", ".join(sorted(labellers)) or "none"
        message = f"no labeller {query.labeller!r} here; loaded: {known}."
        raise ApiError(404, message, "labeller")
    found = [
        (layer, label)
        for layer, one in sets
        if query.layer in (None, layer) and query.labeller in (None, one.labeller)
        for label in _matching(one, query)
    ]
    page = found[query.offset : query.offset + query.limit]
    data = [{"layer": layer, **label.to_dict()} for layer, label in page]
    return {"data": data, "total": len(found)}


def _label_sets(hub: Hub) -> list[tuple[int, LabelSet]]:
    return [(layer, one) for layer, sets in hub.labels.items() for one in sets]


def _matching(label_set: LabelSet, query: LabelQuery) -> list[Label]:
    if query.q is None:
        one = None if query.index is None else label_set.get(query.index)
        return list(label_set) if query.index is None else [one] if one else []
    try:
        found = label_set.search(query.q, len(label_set))
    except ConfigError as error:
        raise ApiError(501, str(error), "q") from None
    return [label for label in found if query.index in (None, label.index)]


@router.get("/describe")
async def describe(request: Request) -> dict[str, Any]:
    """What is observed, with which SAE and labels, by whom, within which limits, and what was
    lost so far."""
    hub: Hub = request.app.state.hub
    now = time.monotonic()
    sites = hub.senders.sites()
    settings = hub.settings
    senders = hub.senders.describe(now)
    return {
        "model": hub.model,
        "epoch": hub.epoch,
        "armed": hub.senders.armed(now),
        "sites": msgspec.to_builtins(sites),
        "top_k": settings.top_k,
        "special_token_ids": special_ids(hub.tokenizer),
        "labellers": [_coverage(layer, one, sites) for layer, one in _label_sets(hub)],
        "recording": _recording(settings),
        "replay": request.app.state.replay,
        "guide": _guide(request),
        "access": _access(request),
        "limits": {
            "trace_requests": settings.trace_requests,
            "memory_mb": settings.memory_mb,
            "kept_requests": len(hub.traces),
            "kept_bytes": hub.traces.bytes + hub.ring.bytes,
            "evicted_requests": hub.traces.evicted,
            "max_kept_bytes": hub.parts.traces + hub.parts.ring,
            "prefix_bytes": hub.prefixes.bytes,
            "max_prefix_bytes": hub.parts.prefix,
            "running_bytes": hub.budget.choices + hub.budget.rows,
            "max_running_bytes": hub.parts.running,
            "readers": hub.readers,
            "max_readers": settings.max_readers,
            "senders": len(senders),
            "max_senders": MAX_SENDERS,
        },
        "problems": hub.senders.problems(now),
        "warnings": sorted({text for sender in senders for text in sender["warnings"]}),
        "senders": senders,
        "counters": dict(hub.counters),
    }


def _guide(request: Request) -> list[dict[str, Any]]:
    """What the page suggests to ask, where it can."""
    return (
        [] if request.app.state.upstream is None else msgspec.to_builtins(request.app.state.guide)
    )


def _access(request: Request) -> dict[str, bool]:
    """Whether there are keys; whether who asks may list requests, and has signed in."""
    access: Access = request.app.state.access
    caller: Caller = request.state.caller
    return {
        "keys": bool(access.keys),
        "lists": caller.rights.lists,
        "session": caller.session is not None,
    }


def _recording(settings: Settings) -> dict[str, Any] | None:
    """What people who chat should know: that it is kept, how long, and whether with their words."""
    if settings.record is None:
        return None
    return {
        "rate": settings.record_rate,
        "days": settings.record_days,
        "redact": settings.record_redact,
    }


def _coverage(layer: int, label_set: LabelSet, sites: list[Site]) -> dict[str, Any]:
    width = next((site.sae.width for site in sites if site.layer == layer), None)
    count = len(label_set)
    return {
        "labeller": label_set.labeller,
        "layer": layer,
        "labels": count,
        "coverage": round(count / width, 4) if width else None,
    }


@router.get("/{index}")
async def card(
    request: Request,
    index: int,
    layer: int | None = Query(None, ge=0, description="May be left out where one is observed."),
    weights: bool = Query(True, description="false: without what takes reading weights."),
) -> dict[str, Any]:
    """The feature card: labels, density, histogram, examples, tokens that it promotes, neighbours.

    `missing` says of each field that is null what it wants. The first card takes longer: a process
    starts that reads weights.
    """
    hub: Hub = request.app.state.hub
    site = _site(hub, layer)
    if not 0 <= index < site.sae.width:
        last = site.sae.width - 1
        raise ApiError(404, f"feature {index} does not exist; there are 0 to {last}.", "index")
    reader: CardReader = request.app.state.cards
    model = request.app.state.config.model_source
    try:
        found = await reader.read(Wanted(site, index, model, weights))
    except CardError as error:
        raise ApiError(503, str(error)) from None
    return _with_labels(hub, found)


def _site(hub: Hub, layer: int | None) -> Site:
    sites = {site.layer: site for site in hub.senders.sites()}
    if not sites:
        raise ApiError(503, "no engine has said yet which SAEs it reads; try again when ready.")
    served = ", ".join(map(str, sorted(sites)))
    if layer is None:
        if len(sites) > 1:
            raise ApiError(400, f"say which layer; {served} are observed.", "layer")
        return next(iter(sites.values()))
    if layer not in sites:
        raise ApiError(404, f"layer {layer} is not observed here; {served} is.", "layer")
    return sites[layer]


def _with_labels(hub: Hub, found: Card) -> dict[str, Any]:
    found.neighbours = found.neighbours and [_named(hub, found.layer, n) for n in found.neighbours]
    sets = hub.labels.get(found.layer, [])
    labels = [label.to_dict() for one in sets if (label := one.get(found.index)) is not None]
    return {
        **msgspec.to_builtins(found),
        "label": labels[0] if labels else None,
        "labels": labels,
    }


def _named(hub: Hub, layer: int, neighbour: Neighbour) -> Neighbour:
    return msgspec.structs.replace(
        neighbour,
        label=hub.shown.labels(layer).get(neighbour.index),
        unreliable=neighbour.index in hub.shown.unreliable(layer),
    )
