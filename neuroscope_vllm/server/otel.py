"""Log events over OTLP: one for each choice that ended, and one for each hit of a rule.

Off unless the settings ask for it. On the event loop this is one more reader of the stream; events
are made on a thread, and OpenTelemetry's batch processor sends them on another: a collector that is
slow or gone costs events, which are counted, and never the hub's time. What was said is left out:
ids, counts, features and their labels only. And as who reads a collector's logs has not shown a
request's secret, neither features nor hits of one that has a secret are told.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from opentelemetry._logs import SeverityNumber
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import (
    BatchLogRecordProcessor,
    LogRecordExporter,
    LogRecordExportResult,
)
from opentelemetry.sdk.environment_variables import OTEL_BLRP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from neuroscope_vllm.core import events
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.traces import Event, Trace
from neuroscope_vllm.server.version import installed_version

BATCH_EVENTS = 1024
REST_S = 0.1
"""Between two looks at the stream."""
QUEUE_EVENTS = 2048
"""Log events that wait for the collector, unless OTEL_BLRP_MAX_QUEUE_SIZE says otherwise."""
BREATH_EVENTS = 32
BREATH_S = 0.001
"""Our thread's pause after each few events: the hub's turn, which needs the same interpreter."""
CLOSE_S = 3.0
TOP_FEATURES = 10


class _Told(NamedTuple):
    """A `done` or `rule` event, and what is kept of its choice; of a rule, the first event only."""

    event: Event
    kept: list[Event]


class Export:
    """Follows a hub from `start` to `close`, and sends to where OTEL_EXPORTER_OTLP_* say.

    Counts in the hub's counters: `otel_events_exported`, `_failed` that the collector did not take,
    `_dropped` because too many waited already.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._model = hub.model
        for outcome in ("exported", "failed", "dropped"):
            hub.counters[f"otel_events_{outcome}"] += 0  # threads add no keys while others read
        self._exporter = _Counted(OTLPLogExporter(), hub.counters)
        self._capacity = int(os.environ.get(OTEL_BLRP_MAX_QUEUE_SIZE, QUEUE_EVENTS))
        self._emitted = 0
        # It warns of each attempt, and then tells of the failure.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
        resource = Resource.create().merge(
            Resource({"service.name": "neuroscope", "service.version": installed_version()})
        )
        self._provider = LoggerProvider(
            resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_log_record_processor(
            BatchLogRecordProcessor(self._exporter, max_queue_size=self._capacity)
        )
        self._logger = self._provider.get_logger("neuroscope_vllm", installed_version())

    def start(self) -> None:
        self._reader = self._hub.follow()
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Send what has ended; takes at most CLOSE_S."""
        self._task.cancel()
        told = self._take()

        def finish() -> None:
            self._emit(told)
            self._provider.shutdown()

        # A daemon: the exporter may wait longer for a collector than we do.
        ending = threading.Thread(target=finish, name="neuroscope-otel", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, CLOSE_S)
        self._hub.unsubscribe(self._reader)

    async def _follow(self) -> None:
        while True:
            if told := self._take():
                await asyncio.to_thread(self._emit, told)
            await self._reader.wait()
            await asyncio.sleep(REST_S)

    def _take(self) -> list[_Told]:
        told: list[_Told] = []
        while batch := self._reader.take(BATCH_EVENTS):
            for event in batch:
                trace = event.trace
                if trace is None:
                    continue
                if event.name == "done":
                    told.append(_Told(event, trace.read(trace.first, trace.end - trace.first)))
                elif event.name == "rule" and not event.is_secret:
                    told.append(_Told(event, _first(trace)))
        return told

    def _emit(self, told: list[_Told]) -> None:
        for one in told:
            request = _request(one.kept)
            if one.event.name == "done":
                self._log("neuroscope.request", _ended(one, request, self._model), request)
            else:
                self._log("gen_ai.evaluation.result", _hit(one.event), request)

    def _log(
        self, name: str, attributes: Mapping[str, Any], request: events.RequestEvent | None
    ) -> None:
        if self._emitted - self._exporter.taken >= self._capacity:
            self._hub.counters["otel_events_dropped"] += 1
            return
        self._emitted += 1
        self._logger.emit(
            timestamp=time.time_ns(),
            context=_context(request),
            severity_number=SeverityNumber.INFO,
            event_name=name,
            attributes={key: value for key, value in attributes.items() if value is not None},
        )


class _Counted(LogRecordExporter):
    """An exporter whose outcomes are counted."""

    def __init__(self, exporter: OTLPLogExporter, counters: Counter[str]) -> None:
        self.taken = 0
        self._exporter = exporter
        self._counters = counters

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        result = LogRecordExportResult.FAILURE
        try:
            result = self._exporter.export(batch)
        finally:
            outcome = "exported" if result is LogRecordExportResult.SUCCESS else "failed"
            self._counters[f"otel_events_{outcome}"] += len(batch)
            self.taken += len(batch)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _Token(msgspec.Struct):
    """What is read of a `token` event."""

    layer: int | None
    top_features: list[events.Feature]
    sink: bool = False


_request_decoder = msgspec.json.Decoder(events.RequestEvent)
_token_decoder = msgspec.json.Decoder(_Token)
_done_decoder = msgspec.json.Decoder(events.DoneEvent)
_rule_decoder = msgspec.json.Decoder(events.RuleEvent)
_propagator = TraceContextTextMapPropagator()


def _first(trace: Trace) -> list[Event]:
    first = trace.get(0)
    return [] if first is None else [first]


def _request(kept: list[Event]) -> events.RequestEvent | None:
    """The choice's first event, where it is still kept."""
    named = bool(kept) and kept[0].name == "request"
    return _request_decoder.decode(kept[0].json) if named else None


def _context(request: events.RequestEvent | None) -> Context:
    """The client's span, where vLLM traces."""
    if request is None or request.traceparent is None:
        return Context()
    return _propagator.extract({"traceparent": request.traceparent}, Context())


def _ended(told: _Told, request: events.RequestEvent | None, model: str) -> dict[str, Any]:
    """No event of the conventions fits what is not the client: theirs wants the operation."""
    done = _done_decoder.decode(told.event.json)
    return {
        "gen_ai.response.id": done.request_id,
        "gen_ai.request.id": done.request_id,  # as vLLM's own spans have it
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": [done.finish_reason],
        "gen_ai.usage.input_tokens": done.prompt_tokens,
        "gen_ai.usage.output_tokens": done.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": done.cached_tokens,
        "neuroscope.internal_id": done.internal_id,
        "neuroscope.choice": done.choice,
        "neuroscope.positions_dropped": done.dropped,
        "neuroscope.steered": None if request is None else request.steering is not None,
        "neuroscope.retold": None if request is None else request.retold,
        "neuroscope.top_features": None if told.event.is_secret else list(_top_features(told.kept)),
    }


def _top_features(kept: list[Event]) -> Iterator[dict[str, Any]]:
    """By the sum of their scores over the generated tokens; no dense ones."""
    scores: defaultdict[tuple[int, int], float] = defaultdict(float)
    best: dict[tuple[int, int], events.Feature] = {}
    tokens: Counter[tuple[int, int]] = Counter()
    told = [event for event in kept if event.name == "token"]
    for at, event in enumerate(told, 1):
        if at % BREATH_EVENTS == 0:
            time.sleep(BREATH_S)
        token = _token_decoder.decode(event.json)
        if token.layer is None or token.sink:
            continue
        for feature in token.top_features:
            if feature.dense:
                continue
            key = (token.layer, feature.index)
            scores[key] += feature.score
            tokens[key] += 1
            if key not in best or feature.activation > best[key].activation:
                best[key] = feature
    for key in heapq.nlargest(TOP_FEATURES, scores, scores.__getitem__):
        layer, index = key
        yield {
            "layer": layer,
            "index": index,
            "label": best[key].label or "",
            "activation": best[key].activation,
            "tokens": tokens[key],
        }


def _hit(event: Event) -> dict[str, Any]:
    hit = _rule_decoder.decode(event.json)
    return {
        "gen_ai.evaluation.name": f"neuroscope.{hit.rule}",
        "gen_ai.evaluation.score.value": hit.activation,
        "gen_ai.evaluation.score.label": "hit",
        "gen_ai.evaluation.explanation": hit.label,
        "gen_ai.response.id": hit.request_id,
        "gen_ai.request.id": hit.request_id,
        "neuroscope.internal_id": hit.internal_id,
        "neuroscope.choice": hit.choice,
        "neuroscope.layer": hit.layer,
        "neuroscope.feature": hit.feature,
        "neuroscope.position": hit.position,
        "neuroscope.tag": hit.tag,
        "neuroscope.stop": hit.stop,
    }
