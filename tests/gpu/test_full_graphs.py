"""The V2 runner under FULL CUDA graphs: the features of concurrent requests, steered and not, are
what transformers gives for the same tokens on the same GPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuroscope_vllm.core.sae import load_sae
from tests.support.served import SMALL, Served, start_neuroscope

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TOP_K = 8
REQUESTS = 8
FEATURE, VALUE = 17, 40.0
FLAGS = (
    *SMALL,
    *("--compilation-config", json.dumps({"cudagraph_mode": "FULL"})),
    # The one that takes float32, and whole mixed batches into a graph.
    *("--attention-backend", "TRITON_ATTN"),
    *("--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--no-enable-prefix-caching"),
    *("--gpu-memory-utilization", "0.2"),
)
TOLERANCE = 0.05
"""Triton's attention multiplies float32 as TF32. A neighbouring token's are 0.29 and more away."""


@pytest.fixture(scope="module")
def served(
    tiny_gemma2: Path, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    server = start_neuroscope(
        tiny_gemma2,
        tiny_sae,
        tmp_path_factory.mktemp("full") / "log",
        flags=("--ranking", "activation", "--top-k", str(TOP_K)),
        vllm_flags=FLAGS,
        env={"VLLM_USE_V2_MODEL_RUNNER": "1"},
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def residuals(tiny_gemma2: Path) -> Callable[[list[int]], torch.Tensor]:
    """Layer 20's, [n, d_model] on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gemma2, dtype=torch.float32)
    model.to(DEVICE)

    @torch.no_grad()
    def run(ids: list[int]) -> torch.Tensor:
        context = torch.tensor([ids], device=DEVICE)
        return model(context, output_hidden_states=True).hidden_states[21][0].cpu()

    return run


def ask(served: Served, number: int, steer: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": [(11 + number) * i % 300 + 5 for i in range(10 + 20 * number)],
        "max_tokens": 12 + number,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if steer:
        edit = {"op": "add", "layer": 20, "feature": FEATURE, "value": VALUE}
        options = {"steer": [{**edit, "positions": "generated"}]}
        body["vllm_xargs"] = {"neuroscope": json.dumps(options)}
    answer = httpx.post(f"{served.chat}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()


def test_the_runner_and_its_graphs_are_what_was_asked_for(served: Served) -> None:
    senders = httpx.get(f"{served.features}/v1/features/describe").json()["senders"]
    (worker,) = [sender for sender in senders if sender["role"] == "worker"]
    assert (worker["runner"], worker["cudagraph_mode"]) == ("v2", "FULL")
    assert worker["device"] == torch.cuda.get_device_name()


def test_features_are_those_of_transformers(
    served: Served, residuals: Callable[[list[int]], torch.Tensor], tiny_sae: Path
) -> None:
    """Every second request steers. An edit after layer 20 is not in that layer's own input."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(lambda n: ask(served, n, n % 2 == 1), range(REQUESTS)))
    sae = load_sae(tiny_sae)
    errors = []
    for number, answer in enumerate(answers):
        (choice,) = answer["choices"]
        prompt_ids, ids = choice["prompt_token_ids"], choice["token_ids"]
        (trace,) = served.trace(answer["id"])
        rows = [e for e in trace["events"] if e["event"] in ("prompt", "token")]
        assert [row["token_id"] for row in rows] == prompt_ids + ids
        assert [row["position"] for row in rows] == list(range(len(rows)))
        before = residuals(prompt_ids + ids)
        after = before.clone()
        if number % 2 == 1:
            after[len(prompt_ids) :] += VALUE * sae.W_dec[FEATURE]
        pairs = zip(rows[:-1], sae.encode(before), sae.encode(after), strict=False)
        steered = 0
        for row, was, f in pairs:
            errors += of_row(row, f)
            for one in row.get("steered", ()):
                steered += 1
                errors += off([(one["before"], was[FEATURE]), (one["after"], f[FEATURE])], f)
        assert steered == (len(ids) - 1 if number % 2 == 1 else 0)
    assert max(errors) < TOLERANCE
    assert statistics.median(errors) < TOLERANCE / 10


def of_row(row: dict[str, Any], f: torch.Tensor) -> list[float]:
    """How far the activations that are shown are off, and how far from being among the best."""
    best = f.topk(TOP_K).values
    shown = [(one["activation"], f[one["index"]]) for one in row["top_features"]]
    return off(shown, f) + off([(max(want, best[-1]), want) for _, want in shown], f)


def off(pairs: list[tuple[Any, Any]], f: torch.Tensor) -> list[float]:
    """Relative to the row's largest."""
    return [float(abs(found - want)) / max(float(f.max()), 1.0) for found, want in pairs]
