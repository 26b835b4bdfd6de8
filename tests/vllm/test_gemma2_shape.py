"""Gemma 2 2B's real shape with an SAE of Gemma Scope's real shape and layout, random weights."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai

from neuroscope_vllm.cli.bench_shapes import GEMMA_2_2B, SHAPE_FLAGS, write_shape
from tests.support.served import start_neuroscope

D_MODEL, WIDTH = 2304, 16384


def test_gemma_2_2b_shape_loads_serves_and_streams(tmp_path: Path) -> None:
    model, sae = write_shape(tmp_path, GEMMA_2_2B)
    server = start_neuroscope(
        model,
        sae,
        tmp_path / "log",
        vllm_flags=(
            *SHAPE_FLAGS,
            *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "2"),
        ),
    )
    try:
        server.wait_ready()
        (site,) = httpx.get(f"{server.features}/v1/features/describe").json()["sites"]
        assert site["layer"] == 20  # from the path, as Gemma Scope lays it out
        assert (site["sae"]["d_model"], site["sae"]["width"]) == (D_MODEL, WIDTH)
        client = openai.OpenAI(base_url=f"{server.chat}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="shape",
            messages=[{"role": "user", "content": "Hello there"}],
            max_tokens=4,
            extra_body={"ignore_eos": True},
            timeout=300,
        )
        (trace,) = server.trace(answer.id, timeout=60)
        rows = [e for e in trace["events"] if e["event"] in ("prompt", "token")]
        assert len(rows) == answer.usage.prompt_tokens + 4
        for row in rows[:-1]:
            assert len(row["top_features"]) == 8
            assert all(0 <= f["index"] < WIDTH for f in row["top_features"])
            assert row["l0"] > 8
    finally:
        server.stop()
