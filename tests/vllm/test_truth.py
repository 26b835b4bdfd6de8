"""Eight concurrent chats: each stream holds exactly its own tokens, and each token's features
equal what HF transformers and SAELens compute for the same text, in float32.

Run on the V1 runner, compiled, and on the V2 runner under Triton's interpreter.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sae_lens
import torch
from transformers import AutoModelForCausalLM

from tests.support.served import SMALL, V2_ON_CPU, Served, sse_events, start_neuroscope
from tests.support.steered import SteeredReference, ask, assert_same, generated

TOP_K = 8
CHATS = 8
# Chunked prefill in 64-token steps, so that prompts arrive in pieces beside running decodes.
CHUNKED = ("--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--no-enable-prefix-caching")
MODES: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "v1-compiled": ("llama", (), {}),
    "v2": ("gemma2", ("--enforce-eager",), V2_ON_CPU),
}


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(mode: str, tiny_gemma2: Path, tiny_llama: Path) -> Path:
    return {"gemma2": tiny_gemma2, "llama": tiny_llama}[MODES[mode][0]]


@pytest.fixture(scope="module")
def served(
    mode: str, model: Path, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    _, vllm_flags, env = MODES[mode]
    server = start_neuroscope(
        model,
        tiny_sae,
        tmp_path_factory.mktemp("truth") / f"{mode}.log",
        flags=("--ranking", "activation", "--top-k", str(TOP_K)),
        vllm_flags=(*SMALL, *CHUNKED, *vllm_flags),
        env=env,
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def chat(served: Served, number: int, name: str = "truth") -> dict[str, Any]:
    """One streamed chat through the official client; varied lengths and sampled text."""
    client = openai.OpenAI(base_url=f"{served.chat}/v1", api_key="none", max_retries=0)
    text, ids, prompt_ids = "", [], []
    stream = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": f"{number}: " + "a quick fox 😀 " * (1 + 3 * number)}
        ],
        stream=True,
        max_tokens=12 + number,
        temperature=1.0,  # no seed: with chunked prefill it kills vLLM 0.32 on a CPU
        extra_headers={"X-Request-Id": f"{name}-{number}"},
        extra_body={"return_token_ids": True},
    )
    for chunk in stream:
        prompt_ids += getattr(chunk, "prompt_token_ids", None) or []
        for choice in chunk.choices:
            text += choice.delta.content or ""
            ids += getattr(choice, "token_ids", None) or []
    return {"id": f"chatcmpl-{name}-{number}", "text": text, "ids": ids, "prompt": prompt_ids}


@pytest.fixture(scope="module")
def chats(served: Served) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(CHATS) as pool:
        return list(pool.map(lambda n: chat(served, n), range(CHATS)))


def test_runner_is_the_one_asked_for(served: Served, mode: str) -> None:
    senders = httpx.get(f"{served.features}/v1/features/describe").json()["senders"]
    workers = [(s["runner"], s["device"]) for s in senders if s["role"] == "worker"]
    assert workers == [("v2" if mode == "v2" else "v1", "cpu")]
    assert {s["host"] for s in senders} == {socket.gethostname()}


def test_each_stream_holds_exactly_its_own_tokens(
    served: Served, chats: list[dict[str, Any]]
) -> None:
    assert len({tuple(c["prompt"]) for c in chats}) == CHATS
    for c in chats:
        (trace,) = served.trace(c["id"])
        events = trace["events"]
        assert all(e["request_id"] == c["id"] for e in events)
        assert [e["event"] for e in events].count("request") == 1
        assert events[-1]["event"] == "done"
        prompt = [e for e in events if e["event"] == "prompt"]
        tokens = [e for e in events if e["event"] == "token"]
        assert [e["token_id"] for e in prompt] == c["prompt"]
        assert [e["token_id"] for e in tokens] == c["ids"]
        assert [e["token_index"] for e in tokens] == list(range(len(c["ids"])))
        assert [e["position"] for e in prompt + tokens] == list(range(len(prompt + tokens)))
        assert "".join(e["token"] for e in tokens) == c["text"]
        assert [e["features_at"] for e in tokens] == ["self"] * (len(tokens) - 1) + [None]


def test_features_equal_transformers_and_saelens(
    served: Served, chats: list[dict[str, Any]], model: Path, tiny_sae: Path
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sae = sae_lens.SAE.load_from_disk(tiny_sae)
    compared = 0
    for c in chats:
        (trace,) = served.trace(c["id"])
        rows = [e for e in trace["events"] if e["event"] in ("prompt", "token")][:-1]
        ids = torch.tensor([[e["token_id"] for e in rows]])
        with torch.no_grad():
            residual = hf(ids, output_hidden_states=True).hidden_states[21][0]
            activations = sae.encode(residual)
        for row, expected in zip(rows, activations, strict=True):
            values, indices = expected.topk(TOP_K)
            got = {f["index"]: f["activation"] for f in row["top_features"]}
            want = dict(zip(indices.tolist(), values.tolist(), strict=True))
            # Two features closer than the tolerance may trade the last place.
            for index in got.keys() ^ want.keys():
                assert abs(expected[index] - values[-1]) < 1e-3
            for index, value in got.items():
                assert value == pytest.approx(float(expected[index]), rel=1e-3, abs=1e-3)
            assert abs(row["l0"] - int((expected > 0).sum())) <= 1
            compared += 1
    assert compared > CHATS * 20


def test_steering_is_what_a_forward_hook_does(served: Served, model: Path, tiny_sae: Path) -> None:
    """In the compiled graph too."""
    reference = SteeredReference(model, {20: tiny_sae})
    prompt = [11 * i % 300 + 5 for i in range(70)]
    for edit in (
        {"op": "add", "layer": 20, "feature": 17, "value": 9.0},
        {"op": "clamp", "layer": 20, "feature": 3, "value": 6.0, "positions": "generated"},
    ):
        _, found = generated(ask(served, prompt, {"steer": [edit]}, count=8))
        _, plain = generated(ask(served, prompt, count=8))
        assert_same(found, reference.generate(prompt, [edit], 8))
        assert_same(plain, reference.generate(prompt, [], 8))
        assert found != plain


def test_live_stream_beside_a_chat_has_text_and_features(served: Served) -> None:
    """A reader that was there first sees the chat's tokens as they come."""
    events: list[dict[str, Any]] = []
    connected = threading.Event()

    def read() -> None:
        url = f"{served.features}/v1/features/stream"
        with httpx.stream("GET", url, timeout=60) as response:
            connected.set()
            for event in sse_events(response):
                events.append(event)
                if event["event"] == "done":
                    return

    reader = threading.Thread(target=read)
    reader.start()
    assert connected.wait(10)
    c = chat(served, 2, "live")
    reader.join(30)
    tokens = [e for e in events if e["event"] == "token"]
    assert {e["request_id"] for e in events} == {c["id"]}
    assert "".join(e["token"] for e in tokens) == c["text"]
    assert [e["token_id"] for e in tokens] == c["ids"]
    assert all(len(e["top_features"]) == TOP_K for e in tokens[:-1])
    assert set(tokens[0]["top_features"][0]) >= {"index", "label", "activation"}
