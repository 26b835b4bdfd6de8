"""What the side process counts, as Prometheus reads it.

Nothing is measured here: when it is scraped, the collector reads what the hub and the senders
count anyway."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from neuroscope_vllm.core.wire import WIRE_VERSION
from neuroscope_vllm.server.guard import REFUSED
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.metric_families import by_label, counter, gauge
from neuroscope_vllm.server.sender_metrics import sender_metrics
from neuroscope_vllm.server.version import installed_version

GAPS = ("dropped", "slow_reader", "evicted", "restarted")


def registry_of(hub: Hub) -> CollectorRegistry:
    """Everything about a hub and its process."""
    disable_created_metrics()  # a second series for each histogram, which nobody reads
    registry = CollectorRegistry()
    registry.register(HubCollector(hub))
    registry.register(hub.lags.hub)
    registry.register(hub.lags.loop)
    ProcessCollector(registry=registry)
    return registry


class HubCollector(Collector):
    """Reads a hub; to be called on its event loop."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def describe(self) -> list[Metric]:
        return []  # else registering would collect

    def collect(self) -> Iterator[Metric]:
        counters = self._hub.counters
        yield InfoMetricFamily(
            "neuroscope_build",
            "The side process: version of the package and of the wire, and the model served.",
            {
                "version": installed_version(),
                "wire_version": str(WIRE_VERSION),
                "model": self._hub.model,
            },
        )
        yield from sender_metrics(self._hub.senders, time.monotonic())
        yield from _arrivals(counters)
        yield from _refusals(counters)
        yield from _requests(counters)
        yield from self._readers(counters)
        yield from self._memory()
        yield from _extras(counters)

    def _readers(self, counters: Counter[str]) -> Iterator[Metric]:
        hub = self._hub
        yield counter(
            "events_published", "Events of all kinds that the hub told.", [([], hub.ring.end)]
        )
        yield counter(
            "gaps",
            "Gap events, by what was lost: features on their way here (dropped), events that a"
            " reader was too slow for (slow_reader), that are no longer kept (evicted), or of an"
            " earlier side process (restarted). All but dropped are told to one reader.",
            by_label(counters, {why: f"gaps_{why}" for why in GAPS}),
            ["reason"],
        )
        yield counter(
            "positions_dropped",
            "Tokens that were told without features, because these were lost.",
            [([], counters["positions_dropped"])],
        )
        yield counter(
            "reader_events_missed",
            "Events that readers did not get, by the reason of the gap that told them so.",
            by_label(counters, {why: f"events_{why}" for why in ("slow_reader", "evicted")}),
            ["reason"],
        )
        yield gauge(
            "readers",
            "Open streams, of all requests or of one; a recording and an OpenTelemetry export read"
            " all.",
            [(["all"], hub.readers - hub.readers_of_one), (["request"], hub.readers_of_one)],
            ["kind"],
        )
        yield gauge(
            "readers_limit",
            "Ceiling of all of them together (max_readers).",
            [([], hub.settings.max_readers)],
        )
        yield counter(
            "readers_timed_out",
            "Streams that were closed because their reader took nothing for 10 s.",
            [([], counters["readers_timed_out"])],
        )

    def _memory(self) -> Iterator[Metric]:
        hub, parts = self._hub, self._hub.parts
        yield gauge(
            "memory_bytes",
            "What the hub keeps: events of all requests in order (ring), by request (traces),"
            " features of token prefixes (prefixes), and requests that run, with rows that wait"
            " (running). Ring and traces share events, so the sum is more than is used.",
            [
                (["ring"], hub.ring.bytes),
                (["traces"], hub.traces.bytes),
                (["prefixes"], hub.prefixes.bytes),
                (["running"], hub.budget.choices + hub.budget.rows),
            ],
            ["store"],
        )
        yield gauge(
            "memory_limit_bytes",
            "Ceiling of each of these (ring_mb, what the others leave, prefix_mb, running_mb); the"
            " sum is memory_mb. Of running, requests may have three quarters.",
            [
                (["ring"], parts.ring),
                (["traces"], parts.traces),
                (["prefixes"], parts.prefix),
                (["running"], parts.running),
            ],
            ["store"],
        )
        yield gauge("requests_kept", "Choices kept for replay.", [([], len(hub.traces))])
        yield counter(
            "requests_evicted", "Choices that gave room to others.", [([], hub.traces.evicted)]
        )
        yield counter(
            "prefix_cache_hits",
            "Blocks of 16 prompt tokens that vLLM had cached and whose features were known here.",
            [([], hub.prefixes.hits)],
        )
        yield counter(
            "prefix_cache_misses",
            "Likewise, and they were not known: the tokens are told without features.",
            [([], hub.prefixes.misses)],
        )


def _arrivals(counters: Counter[str]) -> Iterator[Metric]:
    yield counter("hub_messages", "Messages that came from engines.", [([], counters["messages"])])
    yield counter(
        "hub_messages_refused",
        "Of these, such that are no message (malformed), or that the hub tripped over (failed).",
        by_label(counters, {why: f"messages_{why}" for why in ("malformed", "failed")}),
        ["reason"],
    )
    yield counter(
        "hub_connections_refused",
        "Connections to the hub's TCP socket without its key.",
        [([], counters["connections_refused"])],
    )
    yield counter(
        "hub_resyncs",
        "Times that an engine told all its requests anew, because messages were lost.",
        [([], counters["resyncs"])],
    )
    yield counter(
        "hub_steps_incomplete",
        "Steps of which a pipeline stage said nothing in time, or that there was no room to wait"
        " with; they are told without its layers.",
        [([], counters["steps_incomplete"])],
    )
    yield counter("hub_rows", "Feature rows that came from engines.", [([], counters["rows"])])
    reasons = ("rejected", "recomputed", "after_end", "unknown_request", "held_too_long")
    names = {why: f"rows_{why}" for why in reasons} | {"unknown_request": "rows_of_unknown_request"}
    yield counter(
        "hub_rows_unused",
        "Of these, such that no event was made of: of tokens that do not stand (rejected), told"
        " already (recomputed), after a request's end (after_end), of a request that nobody"
        " announced (unknown_request), or waiting too long for their tokens (held_too_long).",
        by_label(counters, names),
        ["reason"],
    )


def _refusals(counters: Counter[str]) -> Iterator[Metric]:
    plain = ("requests", "readers", "readers_of_one_key", "senders", "steering", "cards", "exports")
    limited = {"chats": "passed"} | {what: what for what in plain}
    yield counter(
        "refused_at_limit",
        "What there was no room for: requests to follow (they run all the same), readers,"
        " readers beyond the share of their key, senders, chats to pass through to vLLM, changes"
        " of steering, cards, exports.",
        by_label(counters, {what: f"{name}_refused" for what, name in limited.items()}),
        ["what"],
    )
    yield counter(
        "http_refused",
        "Requests to the features port that were refused: "
        + ", ".join(f"{why} ({kind})" for kind, why in REFUSED.items())
        + ".",
        by_label(counters, {kind: f"refused_{kind}" for kind in REFUSED}),
        ["reason"],
    )
    yield counter(
        "sessions_displaced",
        "Sessions of browsers that ended early, because their key or all together had too many.",
        [([], counters["sessions_displaced"])],
    )
    yield counter(
        "hub_ticks_failed",
        "Times that the hub could not do what was due; the side process's log says why.",
        [([], counters["ticks_failed"])],
    )


def _requests(counters: Counter[str]) -> Iterator[Metric]:
    started, done = counters["requests"], counters["requests_done"]
    yield counter("requests_started", "Choices that began; n=2 makes two.", [([], started)])
    yield counter("requests_done", "Choices that ended, for any reason.", [([], done)])
    yield counter(
        "requests_failed",
        "Of these, such that the hub had to end, because their engine or its messages were lost.",
        [([], counters["requests_failed"])],
    )
    yield gauge("requests_running", "Choices that run.", [([], started - done)])
    yield counter(
        "requests_started_twice",
        "Times that the begin of a choice was told while it ran already; that changes nothing.",
        [([], counters["requests_started_twice"])],
    )
    yield counter(
        "tokens",
        "Tokens that stand, of prompts and generated. Those of requests that a side process tells"
        " anew after its start count there again.",
        by_label(counters, {"prompt": "prompt_tokens", "generated": "tokens"}),
        ["phase"],
    )
    yield counter(
        "prompt_tokens_cached",
        "Prompt tokens that vLLM took from its prefix cache, and so did not run.",
        [([], counters["prompt_tokens_cached"])],
    )
    yield counter(
        "tokens_ignored",
        "Generated tokens that could not be placed: those before them were lost and come again"
        " (missed), after a request's end, or of one that nobody announced.",
        by_label(
            counters,
            {
                "missed": "tokens_missed",
                "after_end": "tokens_after_end",
                "unknown_request": "tokens_of_unknown_request",
            },
        ),
        ["reason"],
    )


def _extras(counters: Counter[str]) -> Iterator[Metric]:
    """Of what is off unless asked for."""
    if "record_requests" in counters:
        outcomes = ("skipped", "dropped", "failed")
        names = {"written": "record_requests"} | {one: f"record_requests_{one}" for one in outcomes}
        yield counter(
            "recorded_requests",
            "Choices that ended while recording is on: written, not sampled (skipped), dropped"
            " before the writer came to them, or not to be written (failed).",
            by_label(counters, names),
            ["outcome"],
        )
    if "otel_events_exported" in counters:
        yield counter(
            "otel_events",
            "OpenTelemetry log events: exported, not taken by the collector (failed), or dropped"
            " because too many waited. What the export itself was too slow for is among"
            " neuroscope_reader_events_missed.",
            by_label(
                counters, {one: f"otel_events_{one}" for one in ("exported", "failed", "dropped")}
            ),
            ["outcome"],
        )
