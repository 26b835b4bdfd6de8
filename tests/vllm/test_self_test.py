"""The self-test at start: what it says of a healthy server, and that a dead hook stops one."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroscope_vllm.cli.demo import demo_model, demo_sae
from neuroscope_vllm.core import wire
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.sae import SAE, SAEInfo, load_sae
from neuroscope_vllm.core.sae.sparse import firings_of
from neuroscope_vllm.engine.serving.self_test import (
    MAX_TOKENS,
    TEXT,
    UNWRITTEN,
    Probe,
    expected_l0,
    verdict,
)
from neuroscope_vllm.engine.serving.step import StepView
from neuroscope_vllm.engine.vllm.self_test import REQUEST_ID, SelfTest
from tests.support.served import SMALL, Served, start_neuroscope

DEAD_HOOK = Path(__file__).parents[1] / "support" / "dead_hook"


# The served demo: a real model and the SAE trained on it.


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = start_neuroscope(
        demo_model(),
        demo_sae(),
        tmp_path_factory.mktemp("self_test") / "demo.log",
        # The text arrives in pieces of 48, and its blocks would be found in the prefix cache.
        vllm_flags=(*SMALL, "--enforce-eager", "--max-num-batched-tokens", "48"),
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def describe(served: Served) -> dict[str, Any]:
    return httpx.get(f"{served.features}/v1/features/describe").json()


def worker(served: Served) -> dict[str, Any]:
    (found,) = [s for s in describe(served)["senders"] if s["role"] == "worker"]
    return found


def test_the_demo_passes_near_its_card_and_as_transformers_computes_it(served: Served) -> None:
    (result,) = worker(served)["self_test"]
    assert (result["warning"], result["failure"]) == (None, None)
    assert describe(served)["warnings"] == []
    calibration = Calibration.load(demo_sae() / "calibration.safetensors")
    tokens = AutoTokenizer.from_pretrained(demo_model()).encode(TEXT)[:MAX_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    with torch.no_grad():
        rows = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[21][0]
    rows = rows[1:][rows[1:].norm(dim=1) <= calibration.sink_norm]
    sae = load_sae(str(demo_sae()))
    assert result["tokens"] == len(rows)
    assert result["explained_variance"] == pytest.approx(sae.explained_variance(rows), abs=1e-2)
    assert result["l0"] == pytest.approx(sae.l0(rows), abs=0.5)
    # The card: 0.890 and 77.9 on 156,856 tokens of other texts; the calibration's own: 72.2.
    assert result["explained_variance"] == pytest.approx(0.890, abs=0.05)
    assert result["l0"] == pytest.approx(77.9, rel=0.1)
    assert result["expected_l0"] == pytest.approx(72.2, rel=0.01)


def test_the_server_is_armed_and_nothing_of_the_test_reached_the_hub(served: Served) -> None:
    health = httpx.get(f"{served.features}/health")
    assert (health.status_code, health.json()["armed"]) == (200, True)
    found = describe(served)
    assert found["limits"]["kept_requests"] == 0
    counters = worker(served)["counters"]
    assert [counters.get(n, 0) for n in ("steps", "rows_observed", "messages_sent")] == [0, 0, 0]
    assert httpx.get(f"{served.features}/v1/requests/{REQUEST_ID}").status_code == 404
    metrics = httpx.get(f"{served.chat}/metrics").text
    for name in ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total"):
        (line,) = [x for x in metrics.splitlines() if x.startswith(f"vllm:{name}")]
        assert float(line.split()[-1]) == 0.0, line


def test_the_same_text_from_a_client_is_computed_and_streamed(served: Served) -> None:
    """Its prefix is not in the cache, and its features are there from the first token."""
    answer = httpx.post(
        f"{served.chat}/v1/completions",
        json={"model": "tiny", "prompt": TEXT, "max_tokens": 3, "ignore_eos": True},
        headers={"X-Request-Id": "same"},
        timeout=120,
    )
    answer.raise_for_status()
    (trace,) = served.trace(answer.json()["id"])
    prompt = [e for e in trace["events"] if e["event"] == "prompt"]
    assert len(prompt) == answer.json()["usage"]["prompt_tokens"] > MAX_TOKENS
    assert not any(e.get("cached") for e in prompt)
    assert all(e["features_at"] == "self" for e in prompt)


# A dead hook.


def test_a_dead_hook_stops_the_server_and_says_why(
    tiny_llama: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    server = start_neuroscope(
        tiny_llama,
        tiny_sae,
        tmp_path / "log",
        vllm_flags=(*SMALL, "--enforce-eager"),
        env={"PYTHONPATH": str(DEAD_HOOK)},
    )
    family = psutil.Process(server.process.pid)
    try:
        children: set[psutil.Process] = set()
        while server.process.poll() is None:
            with contextlib.suppress(psutil.Error):
                children |= set(family.children(recursive=True))
            time.sleep(0.5)
        assert server.process.returncode not in (0, None)
        _, alive = psutil.wait_procs(list(children), timeout=10)
        assert alive == []
    finally:
        server.stop()
    log = server.log.read_text()
    reason = "neuroscope: self-test failed: the activation hook of layer 20 wrote nothing"
    assert log.count(reason) == 1
    assert "Application startup complete" not in log


# The verdict, by itself.


@pytest.fixture(scope="module")
def sae() -> SAE:
    """Orthogonal features of a small space: it reconstructs what is made of them."""
    width = d_model = 32
    basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=_generator()))[0]
    info = SAEInfo(source="x", format="saelens", architecture="jumprelu", d_model=32, width=32)
    threshold = torch.full((width,), 1.0)
    return SAE(basis.T.contiguous(), torch.zeros(width), threshold, basis, torch.zeros(32), info)


@pytest.fixture(scope="module")
def rows(sae: SAE) -> Tensor:
    """[64, 32]: about 8 features of 2 to 4 active on each row, and a little noise."""
    generator = _generator()
    active = torch.rand(64, 32, generator=generator) < 0.25
    f = active * (2 + 2 * torch.rand(64, 32, generator=generator))
    return sae.decode(f) + 0.05 * torch.randn(64, 32, generator=generator)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def probe(sae: SAE, *, l0: float | None = 8.0, sink: float | None = None) -> Probe:
    return Probe(20, sae, sink, l0)


def test_rows_that_fit_pass(sae: SAE, rows: Tensor) -> None:
    result = verdict(rows, probe(sae), known_text=True)
    assert (result.failure, result.warning, result.tokens) == (None, None, 63)
    assert result.l0 == pytest.approx(8, abs=1)
    assert result.explained_variance is not None
    assert result.explained_variance > 0.95


def broken(rows: Tensor, how: str) -> Tensor:
    rows = rows.clone()
    if how == "nan":
        rows[5, 3] = math.nan
    elif how == "inf":
        rows[-1] = math.inf
    elif how == "zero":
        rows.zero_()
    elif how == "constant":
        rows[:] = rows[7]
    elif how == "one row unwritten":
        rows[9] = UNWRITTEN
    else:
        rows[:] = UNWRITTEN
    return rows


@pytest.mark.parametrize(
    ("how", "says"),
    {
        "nan": "not finite",
        "inf": "not finite",
        "zero": "only zeros",
        "constant": "the same residual at every position",
        "one row unwritten": "wrote nothing",
        "unwritten": "wrote nothing",
    }.items(),
)
@pytest.mark.parametrize("known_text", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_can_not_be_true_fail(
    sae: SAE, rows: Tensor, how: str, says: str, known_text: bool, dtype: torch.dtype
) -> None:
    result = verdict(broken(rows, how).to(dtype), probe(sae), known_text)
    assert result.failure is not None
    assert says in result.failure
    assert "layer 20" in result.failure


@pytest.mark.parametrize(
    ("factor", "says"), [(0.2, "0.0 features are active a token"), (-1.0, "explains -")]
)
def test_rows_of_another_scale_or_space_warn(
    sae: SAE, rows: Tensor, factor: float, says: str
) -> None:
    result = verdict(rows * factor, probe(sae), known_text=True)
    assert result.failure is None
    assert result.warning is not None
    assert says in result.warning


@pytest.mark.parametrize(("expected", "warned"), [(8, False), (20, False), (30, True), (2, True)])
def test_l0_far_from_the_recorded_one_warns(
    sae: SAE, rows: Tensor, expected: float, warned: bool
) -> None:
    result = verdict(rows, probe(sae, l0=expected), known_text=True)
    assert (result.warning is not None) == warned


def test_sinks_and_the_first_position_are_left_out(sae: SAE, rows: Tensor) -> None:
    loud = rows.clone()
    loud[0] *= 1000
    loud[10] *= 1000
    plain = verdict(torch.cat([rows[:10], rows[11:]]), probe(sae), known_text=True)
    cut = verdict(loud, probe(sae, sink=100.0), known_text=True)
    assert (cut.tokens, cut.l0, cut.explained_variance) == (62, plain.l0, plain.explained_variance)


def test_rms_input_is_normalised_as_the_encoder_does(sae: SAE, rows: Tensor) -> None:
    scaled = rows / rows.norm(dim=1, keepdim=True) * 32**0.5
    want = verdict(scaled, probe(sae), known_text=True)
    got = verdict(scaled * 50, probe(sae.reading_rms()), known_text=True)
    assert (got.l0, got.explained_variance) == (want.l0, want.explained_variance)
    # Of rows of unequal size, what is explained is weighed by size.
    assert verdict(rows * 50, probe(sae.reading_rms()), known_text=True).l0 == want.l0


def test_without_a_known_text_or_enough_of_it_there_are_no_figures(sae: SAE, rows: Tensor) -> None:
    nonsense = -rows
    assert verdict(nonsense, probe(sae), known_text=False) == wire.SelfTest(layer=20)
    assert verdict(nonsense[:16], probe(sae), known_text=True) == wire.SelfTest(layer=20)


def test_expected_l0_comes_from_the_calibration_or_the_publishers_path(sae: SAE) -> None:
    scope = SAEInfo(
        source="hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
        format="gemma-scope",
        architecture="jumprelu",
        d_model=2304,
        width=16384,
    )
    calibration = Calibration.empty(32)
    firing = torch.tensor([[1.0] * 8 + [0.0] * 24, [1.0] * 4 + [0.0] * 28])
    calibration.update(2, firings_of(firing))
    assert expected_l0(scope, None) == 71
    assert expected_l0(scope, calibration) == 6
    assert expected_l0(sae.info, None) is None


# The worker's part.


def step(request_id: str, start: int, count: int) -> StepView:
    positions = torch.arange(start, start + count)
    return StepView([request_id], [0, count], positions, positions, first_positions=[0])


def test_steps_before_it_and_its_own_go_nowhere_and_chunks_are_joined(
    sae: SAE, rows: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = torch.zeros(40, 32)
    taken: list[StepView] = []
    test = SelfTest([probe(sae)], [buffer], taken.append)
    test.on_step(step("_v2_mixed_warmup_decode_", 0, 4))
    assert (taken, test.passed, len(test.warnings)) == ([], False, 1)
    test.begin()
    for start, stop in ((0, 40), (40, 64)):
        buffer[: stop - start] = rows[start:stop]
        test.on_step(step(REQUEST_ID, start, stop - start))
        assert (buffer == UNWRITTEN).all()
    with caplog.at_level(logging.WARNING):
        assert test.end(64, True) == []
    assert (test.passed, test.warnings, caplog.text) == (True, [], "")
    assert test.results == [verdict(rows, probe(sae), known_text=True)]
    test.on_step(step("chat", 0, 3))
    assert [s.request_ids for s in taken] == [["chat"]]


@pytest.mark.parametrize("seen", [0, 40])
def test_rows_that_never_came_fail(sae: SAE, rows: Tensor, seen: int) -> None:
    buffer = torch.zeros(40, 32)
    test = SelfTest([probe(sae)], [buffer], lambda step: None)
    test.begin()
    if seen:
        buffer[:] = rows[:seen]
        test.on_step(step(REQUEST_ID, 0, seen))
    (failure,) = test.end(64, True)
    assert "wrote nothing" in failure
    assert not test.passed
    assert test.warnings == [failure]
