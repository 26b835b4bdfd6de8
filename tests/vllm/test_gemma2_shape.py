"""Gemma 2 2B's real shape with an SAE of Gemma Scope's real shape and layout, random weights."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
from transformers import Gemma2Config

from tests.support import models
from tests.support.served import start_neuroscope

# google/gemma-2-2b-it's config.json, but for the ids of the little tokenizer.
SHAPE = {
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "vocab_size": 256000,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "dtype": "bfloat16",
}
WIDTH = 16384


def test_gemma_2_2b_shape_loads_serves_and_streams(tmp_path: Path) -> None:
    model = tmp_path / "gemma-2-2b-shape"
    model.mkdir()
    tokenizer = models.write_tokenizer(model)
    Gemma2Config(
        **SHAPE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(model)
    sae = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    models.write_gemma_scope_sae(sae, d_model=SHAPE["hidden_size"], width=WIDTH)
    server = start_neuroscope(
        model,
        sae,
        tmp_path / "log",
        vllm_flags=(
            *("--load-format", "dummy", "--served-model-name", "gemma", "--enforce-eager"),
            *("--max-model-len", "256", "--max-num-seqs", "2"),
        ),
    )
    try:
        server.wait_ready()
        (site,) = httpx.get(f"{server.features}/v1/features/describe").json()["sites"]
        assert site["layer"] == 20  # from the path, as Gemma Scope lays it out
        assert (site["sae"]["d_model"], site["sae"]["width"]) == (2304, WIDTH)
        client = openai.OpenAI(base_url=f"{server.chat}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="gemma",
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
