"""What engines count and how they are, as Prometheus reads it.

Counters of an engine are sums over its senders, each as of its last hello, until an hour after the
last of them left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import InfoMetricFamily, Metric

from neuroscope_vllm.core import wire
from neuroscope_vllm.server.metric_families import counter, gauge
from neuroscope_vllm.server.senders import Senders


def sender_metrics(senders: Senders, now: float) -> Iterator[Metric]:
    """Of those that send to one hub."""
    yield from _info(senders, now)
    yield from _totals(senders.engines.totals())
    yield from _states(senders, now)


def _info(senders: Senders, now: float) -> Iterator[Metric]:
    site_info = InfoMetricFamily(
        "neuroscope_site", "An observed layer and the SAE that reads it.", labels=["layer"]
    )
    for site in senders.sites():
        about = {"sae": site.sae.source, "width": str(site.sae.width), "ranking": site.ranking}
        site_info.add_metric([str(site.layer)], about)
    yield site_info
    engine_info = InfoMetricFamily(
        "neuroscope_engine",
        "An engine that sends features, once for each host of its workers.",
        labels=["engine", "host"],
    )
    missing = [hello for _, one in senders.engines.missing(now) for hello in one.hellos.values()]
    hellos = sorted([*missing, *(s.hello for s in senders.workers())], key=_is_workers)
    for (engine, host), hello in {(one.engine, one.host): one for one in hellos}.items():
        about = {
            "model": hello.model,
            "device": hello.device,
            "dp_rank": str(hello.dp_rank),
            "runner": hello.runner,
            "cudagraph_mode": hello.cudagraph_mode,
        }
        engine_info.add_metric([engine, host], about)
    yield engine_info


def _is_workers(hello: wire.Hello) -> bool:
    return hello.role == "worker"


def _totals(totals: Mapping[tuple[str, str], Counter[str]]) -> Iterator[Metric]:
    workers = {engine: n for (engine, role), n in totals.items() if role == "worker"}

    def total(name: str, help_: str, counted: str, unit: float = 1) -> Metric:
        samples = [([engine], n[counted] * unit) for engine, n in workers.items()]
        return counter(name, help_, samples, ["engine"])

    yield total("steps", "Forward passes whose rows were taken.", "steps")
    yield total(
        "rows_observed",
        "Rows (tokens of forward passes) that the hook saw, rejected drafts and recomputed ones"
        " included; once for each pipeline stage that observes layers.",
        "rows_observed",
    )
    yield total("rows_encoded", "Rows that went through the SAEs.", "rows_encoded")
    reasons = {"backlog": "rows_dropped", "failed": "rows_failed"}
    yield counter(
        "rows_dropped",
        "Rows that were observed but not encoded: the encoder was too far behind (backlog), or"
        " could not encode them (failed; the engine is not armed then).",
        [([e, why], n[name]) for e, n in workers.items() for why, name in reasons.items()],
        ["engine", "reason"],
    )
    yield total(
        "encode_seconds", "Time spent encoding; per step, divide by steps.", "encode_us", 1e-6
    )
    yield total(
        "submit_seconds",
        "Time of the model's own thread that observing took; on a CPU encoding is part of it.",
        "submit_us",
        1e-6,
    )
    yield counter(
        "sender_messages",
        "Messages that engines sent to the hub.",
        [(who, n["messages_sent"]) for who, n in totals.items()],
        ["engine", "role"],
    )
    reasons = {
        "dropped": "messages_dropped",
        "missed": "messages_missed",
        "unencodable": "messages_unencodable",
    }
    yield counter(
        "sender_messages_lost",
        "Messages that engines could not send: the hub was away or slow (dropped), they could"
        " not be made (missed), or not be encoded (unencodable).",
        [([*who, why], n[name]) for who, n in totals.items() for why, name in reasons.items()],
        ["engine", "role", "reason"],
    )


def _states(senders: Senders, now: float) -> Iterator[Metric]:
    armed: dict[str, bool] = {}
    for sender in senders.workers():
        well = sender.hello.armed and not sender.lost(now)
        armed[sender.hello.engine] = armed.get(sender.hello.engine, True) and well
    armed |= {name: False for name, _ in senders.engines.missing(now)}
    yield gauge(
        "armed",
        "1 where all workers of an engine passed their self-test, encoded their last step and"
        " were heard of lately. One that went without a goodbye is 0 for 15 minutes, unless another"
        " took its place. What /health calls armed is all engines that it knows, and at least one.",
        [([engine], well) for engine, well in armed.items()],
        ["engine"],
    )
    yield gauge(
        "problems",
        "Sentences under reasons in /health: what of the engines is not as it should be.",
        [([], len(senders.problems(now)))],
    )
    silent: dict[tuple[str, str], float] = {}
    for sender in senders:
        who = (sender.hello.engine, sender.hello.role)
        silent[who] = max(silent.get(who, 0.0), now - sender.heard_at)
    yield gauge(
        "sender_silent_seconds",
        "Since the longest silent sender of an engine was heard; they speak once a second, and"
        " are forgotten when all of an engine are silent for a minute.",
        silent.items(),
        ["engine", "role"],
    )
    tests = [(s.hello.engine, test) for s in senders.workers() for test in s.hello.self_test]
    yield gauge(
        "self_test_l0",
        "Features active per token on the known text that each worker started with.",
        [([e, str(t.layer)], t.l0) for e, t in tests if t.l0 is not None],
        ["engine", "layer"],
    )
    yield gauge(
        "self_test_explained_variance_ratio",
        "Share of the residuals' variance that the SAE explained on that text.",
        [
            ([e, str(t.layer)], t.explained_variance)
            for e, t in tests
            if t.explained_variance is not None
        ],
        ["engine", "layer"],
    )
