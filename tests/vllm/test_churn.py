"""A storm of requests against a scheduler that has too little of everything.

Chunked prefill, a KV cache too small, prefix sharing, aborts; on both runners, over tensor,
pipeline and data parallelism, and with n-gram drafts. Every position of every choice must come
out once, with its own token, and with the features that HF transformers and SAELens compute.
Each run must have had what it is there for: the counts come from vLLM's own metrics.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import models
from tests.support.oracle import Comparison, Oracle
from tests.support.served import SMALL, V2_ON_CPU, Served, lines, start_neuroscope
from tests.support.steered import Generated, SteeredReference, ask, assert_same, generated

TOP_K = 8
BUDGET = 64
"""Tokens per step."""
SCARCE = (*("--max-num-batched-tokens", str(BUDGET), "--max-num-seqs", "16", "--block-size", "32"),)


@dataclass(frozen=True)
class Mode:
    """One configuration of vLLM, and the storm that it gets."""

    family: str
    vllm_flags: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    requests: int = 40
    longest: int = 160
    kv_tokens: int = 512
    """Room for a few of the sixteen that may run at once."""
    exercised: tuple[str, ...] = ("preemptions", "cache_hits", "chunked_prefills")
    repetitive: bool = False
    layers: tuple[int, ...] = (20,)
    engines: int = 1
    runner: str = "v1"


SINK_NORMS = {"gemma2": {20: 61.0}, "llama": {5: 6.9, 20: 16.5}}
"""Residual norms above these are called sinks here: about one in seven."""

TOLERANCE = 2e-3
"""vLLM's own kernels on a CPU round one row in ten thousand of the random Gemma 2 by 1e-3."""

EAGER = ("--enforce-eager",)
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
DRAFTS = (
    '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3,'
    ' "prompt_lookup_min": 1}'
)
MODES = {
    "v1": Mode(
        "gemma2", EAGER, requests=200, longest=200, kv_tokens=1200,
        # Elsewhere the workers leave the API server no core to notice in time who left.
        exercised=("preemptions", "cache_hits", "chunked_prefills", "aborted"),
    ),
    "v2": Mode(
        "gemma2", EAGER, env=V2_ON_CPU,
        requests=24, longest=100, kv_tokens=512, runner="v2",
    ),
    "tp2": Mode("llama", (*EAGER, "-tp", "2"), env=TWO_CORES),
    "pp2": Mode(
        "llama", (*EAGER, "-pp", "2"), env=V2_ON_CPU | TWO_CORES,
        requests=24, longest=100, kv_tokens=256, runner="v2", layers=(5, 20),
    ),
    "dp2": Mode(
        "llama", (*EAGER, "--data-parallel-size", "2"), env=TWO_CORES,
        engines=2, kv_tokens=352,
    ),
    "ngram": Mode(
        "llama", (*EAGER, "--speculative-config", DRAFTS), repetitive=True,
        exercised=("preemptions", "cache_hits", "chunked_prefills", "drafts_rejected",
                   "drafts_accepted"),
    ),
}  # fmt: skip


@dataclass
class Sent:
    """A request, and what vLLM answered."""

    id: str
    prompt: list[int]
    leaves_after: int | None
    choices: dict[int, list[int]]


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return MODES[request.param]


@pytest.fixture(scope="module")
def model(mode: Mode, tiny_gemma2: Path, tiny_llama: Path) -> Path:
    return {"gemma2": tiny_gemma2, "llama": tiny_llama}[mode.family]


@pytest.fixture(scope="module")
def saes(mode: Mode, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Layer 20's, and others of the same kind. Those of pipeline parallelism lie on two stages."""
    folder = tmp_path_factory.mktemp("churn-saes")
    return {
        layer: tiny_sae
        if layer == 20
        else models.write_saelens_sae(folder / str(layer), d_model=64, width=512, layer=layer)
        for layer in mode.layers
    }


@dataclass
class Outcome:
    """What a storm left behind."""

    sent: list[Sent]
    traces: dict[str, list[dict[str, Any]]]
    vllm: Counter[str]
    workers: list[dict[str, Any]]
    steered: list[Generated]
    """Answers to `STEERED`, which were asked together when the storm was over."""


@pytest.fixture(scope="module")
def outcome(
    mode: Mode, model: Path, saes: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    folder = tmp_path_factory.mktemp("churn")
    flags = ["--ranking", "activation", "--top-k", str(TOP_K), "--max-frequency", "1"]
    for layer, sae in saes.items():
        path = folder / f"calibration-{layer}.safetensors"
        models.write_calibration(path, width=512, sink_norm=SINK_NORMS[mode.family][layer])
        flags += ["--sae", str(sae)] * (layer != mode.layers[0]) + ["--calibration", str(path)]
    server = start_neuroscope(
        model,
        saes[mode.layers[0]],
        folder / "serve.log",
        flags=tuple(flags),
        vllm_flags=(
            *(*SMALL, "--max-model-len", str(mode.longest * 3 // 2 + 16), *SCARCE),
            *("--num-gpu-blocks-override", str(mode.kv_tokens // 32), *mode.vllm_flags),
        ),
        env={**mode.env, "NEUROSCOPE_MEMORY_MB": "1024"},
    )
    try:
        server.wait_ready()
        sent = Storm(server, mode).run()
        # Who left may be noticed late, and what nobody waits for goes on.
        traces = {one.id: server.trace(one.id, len(one.choices), timeout=120) for one in sent}
        describe = httpx.get(f"{server.features}/v1/features/describe").json()
        workers = [s for s in describe["senders"] if s["role"] == "worker"]
        seen = metrics(server)
        with ThreadPoolExecutor(len(STEERED)) as pool:
            answers = list(pool.map(lambda one: ask_steered(server, mode, *one), STEERED))
        return Outcome(sent, traces, seen, workers, answers)
    finally:
        server.stop()


STEERED: list[tuple[list[int], list[dict[str, Any]]]] = [
    ([40 + 7 * i % 90 for i in range(50)], [{"op": "add", "feature": 17, "value": 6.0}]),
    ([40 + 7 * i % 90 for i in range(50)], []),
    ([9, 8, 7, 6, 5] * 4, [{"op": "add", "feature": 3, "value": 4.0, "positions": "generated"}]),
    ([9, 8, 7, 6, 5] * 4, [{"op": "clamp", "feature": 5, "value": 5.0, "positions": "prompt"}]),
    ([200, 100, 50], [{"op": "scale", "feature": f, "value": -1.0} for f in range(7)]),
    ([200, 100, 50], []),
]
"""Prompts and the edits of them at every observed layer."""


def edits_of(mode: Mode, edits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**edit, "layer": layer} for edit in edits for layer in mode.layers]


def ask_steered(
    served: Served, mode: Mode, prompt: list[int], edits: list[dict[str, Any]]
) -> Generated:
    return generated(ask(served, prompt, {"steer": edits_of(mode, edits)}, count=8))[1]


class Storm:
    """Requests of random lengths at random times, a third of which share a beginning, of which a
    quarter are left half-way."""

    def __init__(self, served: Served, mode: Mode, seed: int = 7) -> None:
        self._served = served
        self._mode = mode
        self._random = random.Random(seed)
        self._shared = [self._tokens(mode.longest // 2) for _ in range(3)]
        self._lock = threading.Lock()

    def run(self) -> list[Sent]:
        planned = [self._plan(number) for number in range(self._mode.requests)]
        with ThreadPoolExecutor(24) as pool:
            return list(pool.map(lambda plan: self._send(*plan), planned))

    def _tokens(self, count: int) -> list[int]:
        if not self._mode.repetitive:
            return [self._random.randrange(5, 300) for _ in range(count)]
        phrase = [self._random.randrange(5, 300) for _ in range(6)]
        return (phrase * (count // 6 + 1))[:count]

    def _plan(self, number: int) -> tuple[Sent, dict[str, Any], float]:
        longest = self._mode.longest
        prompt = self._tokens(self._random.randint(1, longest))
        if number % 3 == 0:
            prompt = (self._random.choice(self._shared) + prompt)[:longest]
        leaves = number % 4 == 0
        max_tokens = self._random.randint(1, longest // 2)
        if leaves:
            # Who leaves half-way leaves enough behind for vLLM to notice before the end.
            prompt, max_tokens = prompt[: longest // 2], longest
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0 if self._mode.repetitive else 1.0,
            "ignore_eos": True,
            "n": 2 if number % 10 == 1 and not self._mode.repetitive else 1,
            "stream": True,
            "return_token_ids": True,
        }
        choices = {n: [] for n in range(body["n"])}
        sent = Sent(f"cmpl-storm-{number}", prompt, longest // 8 if leaves else None, choices)
        return sent, body, self._random.random()

    def _send(self, sent: Sent, body: dict[str, Any], pause: float) -> Sent:
        time.sleep(pause)
        headers = {"X-Request-Id": sent.id.removeprefix("cmpl-")}
        url = f"{self._served.chat}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as response:
            assert response.status_code == 200, response.read()
            for chunk in (line[6:] for line in lines(response) if line.startswith("data: {")):
                for choice in json.loads(chunk)["choices"]:
                    sent.choices[choice["index"]] += choice.get("token_ids") or []
                if sent.leaves_after is not None and len(sent.choices[0]) >= sent.leaves_after:
                    break
        return sent


def metrics(served: Served) -> Counter[str]:
    """vLLM's own counters, summed over engines."""
    found: Counter[str] = Counter()
    for line in httpx.get(f"{served.chat}/metrics").text.splitlines():
        if match := re.match(r"vllm:(\w+)(?:\{.*\})? ([\d.e+]+)$", line):
            found[match[1]] += int(float(match[2]))
    return found


def test_everything_once_in_order_with_its_own_features(
    outcome: Outcome,
    mode: Mode,
    model: Path,
    saes: dict[int, Path],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    oracle = Oracle(model, saes, SINK_NORMS[mode.family], TOLERANCE)
    compared, faults, counts = Comparison(), [], Counter[str]()
    for sent in outcome.sent:
        for choice in outcome.traces[sent.id]:
            events, generated = choice["events"], sent.choices[choice["choice"]]
            told = [e for e in events if e["event"] in ("prompt", "token")]
            # One event a layer, in order.
            tokens = told[:: len(mode.layers)]
            if [(e["position"], e["layer"]) for e in told] != [
                (e["position"], layer) for e in tokens for layer in mode.layers
            ]:
                faults.append(f"{sent.id}: layers missing or out of order")
            known = [*sent.prompt, *generated]
            context = [e["token_id"] for e in tokens]
            if [e["position"] for e in tokens] != list(range(len(tokens))):
                faults.append(f"{sent.id}: positions missing, doubled or out of order")
            if context[: len(known)] != known:
                faults.append(f"{sent.id}: tokens of another request")
            if sent.leaves_after is None and len(context) != len(known):
                faults.append(f"{sent.id}: {len(context)} positions of {len(known)}")
            if any(e["event"] in ("gap", "error") for e in events):
                faults.append(f"{sent.id}: a gap or an error")
            done = events[-1]
            ran = [e for e in told if e["features_at"] == "self"]
            cached = [e["position"] for e in tokens if e.get("cached")]
            silent = [e["position"] for e in tokens if e["features_at"] is None]
            end = [position for position in silent if position not in cached]
            # The last token never runs. When a client leaves it may have, or, before the first
            # token, the end of the prompt has not.
            left = done["finish_reason"] == "abort"
            longest = len(tokens) if left and not done["completion_tokens"] else 1
            shortest = 0 if left else 1
            suffix = list(range(len(tokens) - len(end), len(tokens)))
            if end != suffix or not shortest <= len(end) <= longest:
                faults.append(f"{sent.id}: without features: {silent[:8]}")
            oracle.compare(context, ran, compared)
            counts["cached_with_features"] += len(set(cached) - set(silent))
            counts["cached_without_features"] += len(set(cached) & set(silent))
            counts["aborted"] += done["finish_reason"] == "abort"
            counts["chunked_prefills"] += done["prompt_tokens"] - done["cached_tokens"] > BUDGET
    vllm = outcome.vllm
    counts["sinks"] = compared.sinks
    counts["preemptions"] = vllm["num_preemptions_total"]
    counts["cache_hits"] = vllm["prefix_cache_hits_total"]
    counts["drafts_accepted"] = vllm["spec_decode_num_accepted_tokens_total"]
    counts["drafts_rejected"] = (
        vllm["spec_decode_num_draft_tokens_total"] - counts["drafts_accepted"]
    )
    with capsys.disabled():
        print(
            f"\n{request.node.callspec.id}: {len(outcome.sent)} requests,"
            f" {compared.rows} rows compared, worst relative error"
            f" {compared.worst_relative_error:.1e}, {dict(counts)}"
        )
    assert faults == []
    assert compared.wrong == []
    assert compared.rows > 20 * len(outcome.sent)
    assert 0 < counts["sinks"] < compared.rows // 2
    assert counts["cached_with_features"] > 0
    assert counts["cached_without_features"] == 0
    for name in mode.exercised:
        assert counts[name] > 0, f"the run had no {name}"


def test_steered_ones_are_steered_as_by_a_forward_hook(
    outcome: Outcome, mode: Mode, model: Path, saes: dict[int, Path]
) -> None:
    """On every rank and stage, under chunks and drafts, and beside others that are not."""
    reference = SteeredReference(model, saes, sink_norms=SINK_NORMS[mode.family])
    for found, (prompt, edits) in zip(outcome.steered, STEERED, strict=True):
        assert_same(found, reference.generate(prompt, edits_of(mode, edits), 8), TOLERANCE)
    assert outcome.steered[0] != outcome.steered[1]
    assert outcome.steered[4] != outcome.steered[5]


def test_the_configuration_is_the_one_asked_for(outcome: Outcome, mode: Mode) -> None:
    assert {worker["runner"] for worker in outcome.workers} == {mode.runner}
    assert {worker["dp_rank"] for worker in outcome.workers} == set(range(mode.engines))
    # Each observed layer lies on a stage of its own.
    assert len(outcome.workers) == mode.engines * len(mode.layers)
    ranks = {
        event["dp_rank"]
        for choices in outcome.traces.values()
        for choice in choices
        for event in choice["events"]
        if event["event"] == "request"
    }
    assert ranks == set(range(mode.engines))
    for worker in outcome.workers:
        assert worker["counters"]["rows_observed"] == worker["counters"]["rows_encoded"] > 0
