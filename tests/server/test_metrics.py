"""/metrics and OpenTelemetry events of a real side process, against what was sent to it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
import zmq
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from neuroscope_vllm.core import launch, wire
from neuroscope_vllm.core.access import KeyDigests
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.engine.fake import FakeEngine, Script, features_of
from tests.server.otlp import Collector, attributes, collecting
from tests.server.promql import expressions_in, metrics_in
from tests.server.side import Side, start_side, wait_until

DOCKER = Path(__file__).parents[2] / "docker"
PROMPT = [ord(char) for char in "The capital of France is, as you know,"]
OUTPUT = [ord(char) for char in " Paris"]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Observed(NamedTuple):
    side: Side
    engine: FakeEngine
    collector: Collector


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Iterator[Observed]:
    """A side process with everything on that counts, and a collector for its events."""
    directory = tmp_path_factory.mktemp("observed")
    labels = directory / "labels.jsonl"
    first = features_of(OUTPUT[0], len(PROMPT), 20, 1)[0][0]
    labels.write_text(json.dumps({"index": first, "text": "spaces", "labeller": "test"}) + "\n")
    with pytest.MonkeyPatch.context() as environment, collecting() as collector:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        environment.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        environment.setenv("OTEL_BLRP_SCHEDULE_DELAY", "100")
        environment.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
        environment.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "64")
        environment.setenv("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "16")
        side = start_side(
            directory,
            settings={"otel": True, "record": str(directory / "recorded")},
            tokenizer_file=tokenizer_file,
            labels={20: [str(labels)]},
        )
        try:
            with FakeEngine(side.endpoint, top_k=4) as engine:
                side.wait_armed()
                yield Observed(side, engine, collector)
        finally:
            side.process.stop()


def scrape(side: Side) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by sample name and label values, these in order of their labels' names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(side.get("/metrics").text):
        for sample in family.samples:
            key = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[key] = sample.value
    return found


class Growth:
    """What counters have grown by since it was made, as of `now`."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._before = scrape(side)

    def now(self, name: str, *labels: str) -> float:
        name = f"neuroscope_{name}"
        return scrape(self._side)[name].get(labels, 0) - self._before[name].get(labels, 0)


@contextmanager
def connected(side: Side) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 1000
        socket.connect(side.endpoint)
        yield socket


def test_counts_are_of_what_was_sent(observed: Observed):
    side, engine, _ = observed
    grown = Growth(side)
    engine.run("lossy", PROMPT, OUTPUT, Script(lost=frozenset({3, 4, 7}), drafts=1))
    engine.run("whole", PROMPT, OUTPUT)
    engine.run("cached", PROMPT, OUTPUT, Script(cached=32))
    for name in ("lossy", "whole", "cached"):
        side.wait_done(name)
    rows = 3 * (len(PROMPT) + len(OUTPUT)) - 32  # and a draft after each step
    drafts = len(OUTPUT)
    wait_until(lambda: grown.now("rows_observed_total", "fake") == rows + drafts)
    expected = {
        ("rows_encoded_total", "fake"): rows + drafts - 3,
        ("rows_dropped_total", "fake", "backlog"): 3,
        ("hub_rows_total",): rows + drafts - 3,
        ("hub_rows_unused_total", "after_end"): 3,  # the last token's, which nobody is told of
        ("steps_total", "fake"): 3 * (1 + len(OUTPUT)),
        ("requests_started_total",): 3,
        ("requests_done_total",): 3,
        ("requests_failed_total",): 0,
        ("tokens_total", "prompt"): 3 * len(PROMPT),
        ("tokens_total", "generated"): 3 * len(OUTPUT),
        ("prompt_tokens_cached_total",): 32,
        ("prefix_cache_hits_total",): 2,
        ("gaps_total", "dropped"): 2,  # positions 3 to 5 and 7
        ("positions_dropped_total",): 3,
        # A request, its tokens and the end of each, and the gaps.
        ("events_published_total",): 3 * (2 + len(PROMPT) + len(OUTPUT)) + 2,
        # Steps and tokens of each; a lag is taken of every one.
        ("hub_lag_seconds_count",): 3 * (1 + 2 * len(OUTPUT)),
        ("sender_messages_total", "fake", "worker"): 3 * (1 + len(OUTPUT)),
        ("sender_messages_total", "fake", "scheduler"): 3 * (2 + len(OUTPUT)),
    }
    assert {key: grown.now(*key) for key in expected} == expected


def test_it_agrees_with_describe(observed: Observed):
    side = observed.side
    observed.engine.run("agreed", PROMPT, OUTPUT, Script(lost=frozenset({1})))
    side.wait_done("agreed")
    described, found = side.get("/v1/features/describe").json(), scrape(side)

    def value(name: str, *labels: str) -> float:
        return found[f"neuroscope_{name}"][labels]

    counters, limits = described["counters"], described["limits"]
    assert value("requests_started_total") == counters["requests"]
    assert value("tokens_total", "generated") == counters["tokens"]
    assert value("gaps_total", "dropped") == counters["gaps_dropped"]
    assert value("hub_rows_total") == counters["rows"]
    kept = value("memory_bytes", "ring") + value("memory_bytes", "traces")
    assert kept == limits["kept_bytes"]
    ceilings = found["neuroscope_memory_limit_bytes"]
    assert ceilings.keys() == found["neuroscope_memory_bytes"].keys()
    assert sum(ceilings.values()) == limits["memory_mb"] * 2**20
    assert ceilings["ring",] + ceilings["traces",] == limits["max_kept_bytes"]
    assert ceilings["prefixes",] == limits["max_prefix_bytes"]
    assert ceilings["running",] == limits["max_running_bytes"]
    assert value("readers_limit") == limits["max_readers"]
    assert value("requests_kept") == limits["kept_requests"]
    assert value("readers", "all") + value("readers", "request") == limits["readers"]
    assert value("build_info", "fake", *_version(side)) == 1
    assert value("site_info", "20", "activation", "fake", "16384") == 1


def _version(side: Side) -> tuple[str, str]:
    about = side.get("/version").json()
    return about["version"], str(about["wire_version"])


def test_readers_and_what_they_miss(observed: Observed):
    side, grown = observed.side, Growth(observed.side)
    before = scrape(side)["neuroscope_readers"]
    assert before["all",] == 0  # the recording and the export of events take no place
    with side.open("nobody"), side.open(), side.open(headers={"Last-Event-ID": "0-5"}):
        wait_until(lambda: scrape(side)["neuroscope_readers"]["all",] == 2)
        assert scrape(side)["neuroscope_readers"]["request",] == 1
    wait_until(lambda: scrape(side)["neuroscope_readers"] == before)
    assert grown.now("gaps_total", "restarted") == 1


def test_what_is_no_message_is_counted(observed: Observed):
    grown = Growth(observed.side)
    with connected(observed.side) as socket:
        for junk in (b"", b"\xff" * 100, b"\x81\xa4type\xa7nothing"):
            socket.send(junk)
        wait_until(lambda: grown.now("hub_messages_refused_total", "malformed") == 3)


def test_an_engine_that_is_started_again_goes_on_counting(observed: Observed):
    side = observed.side
    # Engines tell their counters once a second, the hub those of its own at once.
    wait_until(lambda: _rows_encoded(side) == scrape(side)["neuroscope_hub_rows_total"][()])
    grown = Growth(side)

    def senders() -> int:
        return len(side.get("/v1/features/describe").json()["senders"])

    for number in range(2):
        wait_until(lambda: senders() == 2)
        with FakeEngine(side.endpoint, top_k=4, armed=number == 1) as engine:
            wait_until(lambda: senders() == 4)
            engine.run(f"again-{number}", PROMPT, OUTPUT)
            side.wait_done(f"again-{number}")
            rows = (number + 1) * (len(PROMPT) + len(OUTPUT))
            wait_until(lambda rows=rows: grown.now("rows_encoded_total", "fake") == rows)
            wait_until(lambda number=number: scrape(side)["neuroscope_armed"]["fake",] == number)
    assert grown.now("rows_encoded_total", "fake") == rows  # also after both said goodbye


def _rows_encoded(side: Side) -> float:
    return scrape(side)["neuroscope_rows_encoded_total"]["fake",]


def test_names_and_forms(observed: Observed):
    text = observed.side.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    ours = [family for family in families if family.name.startswith("neuroscope_")]
    assert len(ours) > 40
    for family in ours:
        assert family.documentation.endswith("."), family.name
        assert (family.type == "counter") == (f"# TYPE {family.name}_total counter" in text)
        assert not family.name.endswith(("_us", "_ms", "_mb", "_percent")), family.name
    asked = {"Accept": "application/openmetrics-text;version=1.0.0"}
    answer = observed.side.get("/metrics", headers=asked)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert len(list(parse_openmetrics(answer.text))) == len(families)


def test_a_hundred_senders_do_not_stop_the_loop(observed: Observed):
    side = observed.side
    sae = SAEInfo(
        source="hf://a/b", format="gemma-scope", architecture="jumprelu", d_model=8, width=64
    )
    names = ("steps", "rows_observed", "rows_encoded", "submit_us", "encode_us", "messages_sent")
    hellos = [
        wire.Hello(
            sender=f"{role}-{number}",
            role=role,
            engine=f"many-{number}",
            dp_rank=number,
            model="fake",
            armed=True,
            sites=[wire.Site(20, sae, "activation", 4, None)] if role == "worker" else [],
            counters=dict.fromkeys(names, number),
            self_test=[wire.SelfTest(20, 100, 50.0, 50.0, 0.8)] if role == "worker" else [],
        )
        for number in range(50)
        for role in ("worker", "scheduler")
    ]
    with connected(side) as socket:
        for hello in hellos:
            socket.send(wire.encode(hello))
        wait_until(lambda: ("many-49",) in scrape(side)["neuroscope_armed"])
        assert scrape(side)["neuroscope_encode_seconds_total"]["many-49",] == 49e-6
        assert scrape(side)["neuroscope_self_test_l0"]["many-3", "20"] == 50
        times = []
        for _ in range(10):
            began = time.perf_counter()
            text = side.get("/metrics").text
            times.append(time.perf_counter() - began)
        print(f"/metrics, 100 senders: {min(times) * 1e3:.1f} ms, {len(text) / 1024:.0f} KiB")
        assert min(times) < 0.1
        for hello in hellos:
            socket.send(wire.encode(wire.Goodbye(hello.sender)))
        wait_until(lambda: ("many-49",) not in scrape(side)["neuroscope_armed"])


def test_a_begin_that_is_told_twice_is_counted(observed: Observed):
    side, grown = observed.side, Growth(observed.side)
    begun = wire.RequestStarted("twice-1", "twice", 0, "fake", 0, b"", 0.0)
    ended = wire.TokensSampled([wire.Sampled("twice-1", [], "abort", None)])
    with connected(side) as socket:
        for message in (begun, begun, ended):
            socket.send(wire.encode(message))
        side.wait_done("twice")
    assert grown.now("requests_started_twice_total") == 1
    assert grown.now("requests_started_total") == 1


def test_dashboard_and_alerts_ask_for_what_there_is(observed: Observed):
    there = {"up"}
    for family in text_string_to_metric_families(observed.side.get("/metrics").text):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        there |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
    dashboard = json.loads((DOCKER / "grafana/dashboards/neuroscope.json").read_text())
    alerts = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())
    for content in (dashboard, alerts):
        expressions = list(expressions_in(content))
        assert len(expressions) > 5
        asked = {name for one in expressions for name in metrics_in(one)}
        assert len(asked) > 5
        assert asked <= there, asked - there
    assert "neuroscope_hub_ticks_failed_total" in asked  # of the alerts: nothing else shows it
    for rule in (rule for group in alerts["groups"] for rule in group["rules"]):
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def test_an_event_for_each_request_and_rule_hit(observed: Observed):
    _, engine, collector = observed
    script = Script(
        lost=frozenset({2}), tag="noticed", traceparent=f"00-{TRACE}-{SPAN}-01", choice=1
    )
    internal_id = engine.run("told", PROMPT, OUTPUT, script)
    [record] = wait_until(lambda: collector.of("told"))
    top = features_of(OUTPUT[0], len(PROMPT), 20, 4)
    found = attributes(record.attributes)
    [first, *_] = [one for one in found.pop("neuroscope.top_features") if one["label"]]
    assert first == {
        "layer": 20,
        "index": top[0][0],
        "label": "spaces",
        "activation": pytest.approx(top[0][1]),
        "tokens": 1,
    }
    assert found == {
        "gen_ai.response.id": "told",
        "gen_ai.request.id": "told",
        "gen_ai.response.model": "fake",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": len(PROMPT),
        "gen_ai.usage.output_tokens": len(OUTPUT),
        "gen_ai.usage.cache_read.input_tokens": 0,
        "neuroscope.internal_id": internal_id,
        "neuroscope.choice": 1,
        "neuroscope.positions_dropped": 1,
        "neuroscope.steered": False,
        "neuroscope.retold": False,
    }
    assert (record.trace_id.hex(), record.span_id.hex()) == (TRACE, SPAN)
    assert abs(record.time_unix_nano / 1e9 - time.time()) < 60
    assert collector.resource["service.name"] == "neuroscope"
    assert collector.resource["deployment.environment.name"] == "test"
    hits = collector.of("told", "gen_ai.evaluation.result")
    assert len(hits) == len(OUTPUT) - 1  # the last token is not run through the model
    assert hits[0].trace_id.hex() == TRACE
    hit = attributes(hits[0].attributes)
    assert hit["gen_ai.evaluation.name"] == "neuroscope.watch"
    assert hit["gen_ai.evaluation.score.value"] == pytest.approx(top[0][1])
    assert hit["gen_ai.evaluation.explanation"] == "spaces"
    assert (hit["neuroscope.position"], hit["neuroscope.tag"]) == (len(PROMPT), "noticed")


def test_features_and_hits_of_a_secret_request_are_not_exported(observed: Observed):
    script = Script(secret="a-secret-of-one-stream", tag="noticed")
    observed.engine.run("hidden", PROMPT, OUTPUT, script)
    [record] = wait_until(lambda: observed.collector.of("hidden"))
    found = attributes(record.attributes)
    assert found["gen_ai.usage.output_tokens"] == len(OUTPUT)
    assert "neuroscope.top_features" not in found
    assert observed.collector.of("hidden", "gen_ai.evaluation.result") == []  # told before the end


def test_a_collector_that_refuses_or_hangs_costs_events_only(observed: Observed):
    side, engine, collector = observed
    wait_until(lambda: _accounted(scrape(side)) == len(collector.records))
    grown, records = Growth(side), len(collector.records)
    collector.status = 400
    engine.run("refused", PROMPT, OUTPUT)
    wait_until(lambda: grown.now("otel_events_total", "failed") == 1)
    collector.status = 200
    collector.open.clear()
    engine.run("much", PROMPT, OUTPUT * 25, Script(tag="noticed", pause_s=0.001))
    side.wait_done("much")
    engine.run("meanwhile", PROMPT, OUTPUT)
    assert side.read("meanwhile")[-1]["event"] == "done"
    wait_until(lambda: grown.now("otel_events_total", "dropped") > 0)
    collector.open.set()
    ended = 1 + len(OUTPUT * 25) + 1  # refused; hits, one less than tokens, and an end; meanwhile
    wait_until(lambda: _accounted(scrape(side)) == records + ended)
    exported = grown.now("otel_events_total", "exported")
    assert exported == len(collector.records) - records


def _accounted(found: dict[str, dict[tuple[str, ...], float]]) -> float:
    return sum(found["neuroscope_otel_events_total"].values())


def test_events_that_can_not_be_sent_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL is grpc"):
        launch.check_side(Settings(otel=True), KeyDigests())
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/protobuf")
    launch.check_side(Settings(otel=True), KeyDigests())
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ConfigError, match=r"pip install 'neuroscope-vllm\[otel\]'"):
        launch.check_side(Settings(otel=True), KeyDigests())
    launch.check_side(Settings(), KeyDigests())
