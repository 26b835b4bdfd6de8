"""The same prompts through both servers, in float32: the same tokens, features and activations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from neuroscope_vllm.cli.demo import demo_model, demo_sae
from tests.support.served import SMALL, Served, start_neuroscope, start_transformers

PROMPTS = (
    "The capital of France is",
    "def add(a, b):",
    "Once upon a time",
    "Water boils at",
    "1, 2, 3, 5, 8,",
    "She was happy because",
    "In 1874 the council",
    "Dear Sir or Madam,",
    "Ein Haus am See",
    "The quick brown fox",
)
FLAGS = ("--ranking", "activation", "--top-k", "8")
TOKENS = 12


class Both(NamedTuple):
    vllm: Served
    transformers: Served


@pytest.fixture(scope="module", params=["tiny-gemma2", "demo"])
def both(
    request: pytest.FixtureRequest,
    tiny_gemma2: Path,
    tiny_sae: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Both]:
    tiny = request.param == "tiny-gemma2"
    model, sae = (tiny_gemma2, tiny_sae) if tiny else (demo_model(), demo_sae())
    logs = tmp_path_factory.mktemp(request.param)
    eager = (*SMALL, "--enforce-eager")
    vllm = start_neuroscope(model, sae, logs / "vllm", flags=FLAGS, vllm_flags=eager)
    here = start_transformers(model, sae, logs / "transformers", flags=FLAGS)
    try:
        yield Both(vllm.wait_ready(), here.wait_ready())
    finally:
        vllm.stop()
        here.stop()


def told(served: Served, prompt: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Greedy tokens, and the events of all tokens."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    url = f"{served.chat}/v1/completions"
    answer = httpx.post(url, json={**body, "return_token_ids": True}, timeout=120).json()
    (trace,) = served.trace(answer["id"])
    events = [event for event in trace["events"] if event["event"] in ("prompt", "token")]
    return answer["choices"][0]["token_ids"], events


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_prompt(both: Both, prompt: str) -> None:
    tokens, events = told(both.vllm, prompt)
    other_tokens, other_events = told(both.transformers, prompt)
    assert other_tokens == tokens
    assert [e["token"] for e in other_events] == [e["token"] for e in events]
    for one, other in zip(events, other_events, strict=True):
        for name in ("position", "token_id", "features_at", "sink", "phase"):
            assert one.get(name) == other.get(name), name
        assert abs((one["l0"] or 0) - (other["l0"] or 0)) <= 1  # one may lie at its threshold
        theirs = {f["index"]: f["activation"] for f in one["top_features"]}
        ours = {f["index"]: f["activation"] for f in other["top_features"]}
        assert list(ours) == list(theirs)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
