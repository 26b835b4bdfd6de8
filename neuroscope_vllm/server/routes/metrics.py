"""GET /metrics, for Prometheus."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

router = APIRouter(tags=["status"])


class _Collected(Collector):
    """Metrics as they were."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, accept: Annotated[str, Header()] = "") -> Response:
    """Counters and gauges of the side process and of the engines that send to it, as Prometheus
    reads them; OpenMetrics where it is asked for. vLLM's own are at its own /metrics."""
    registry: CollectorRegistry = request.app.state.metrics
    collected = _Collected(list(registry.collect()))  # here, so that nothing changes meanwhile
    encode, media_type = choose_encoder(accept)
    return Response(await asyncio.to_thread(encode, collected), media_type=media_type)
