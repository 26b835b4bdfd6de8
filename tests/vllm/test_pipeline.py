"""A step that can not be encoded costs features, counted and shown; the model goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuroscope_vllm.core.ranking import make_ranker
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.sae.encoder import TopKEncoder
from neuroscope_vllm.engine.serving.pipeline import EncodePipeline, LayerEncoder
from neuroscope_vllm.engine.serving.step import StepView
from tests.support.saes import randomise, rows


def new_pipeline(encoder: LayerEncoder, sent: list[Any]) -> EncodePipeline:
    return EncodePipeline(
        [encoder],
        sent.append,
        engine="e",
        num_layers=1,
        device=torch.device("cpu"),
        max_pending_rows=64,
    )


def test_failures_are_counted_and_shown_and_pass(tiny_sae: Any) -> None:
    sae = load_sae(tiny_sae)
    topk = TopKEncoder(sae, make_ranker("activation", width=sae.width), k=4)
    residuals = [torch.randn(3, 64) * 10]
    sent: list[Any] = []
    pipeline = new_pipeline(LayerEncoder(20, topk, None), sent)
    rows = torch.arange(3)
    good = StepView(["a"], [0, 3], positions=rows, token_ids=rows, first_positions=[0])
    bad = StepView(
        ["a"], [0, 3], positions=rows[:1], token_ids=rows, first_positions=[0]
    )  # does not fit its rows
    pipeline.submit(bad, residuals)
    assert pipeline.failing
    assert (pipeline.counters["rows_failed"], sent) == (3, [])
    pipeline.submit(good, residuals)
    assert not pipeline.failing
    assert pipeline.counters["rows_encoded"] == 3
    assert [(s.internal_id, s.start, s.stop) for s in sent[0].spans] == [("a", 0, 3)]


@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", ["TopK", "JumpReLU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_leaves_the_worker_is_what_saelens_computes(
    tmp_path: Path, kind: str, normalize: str, dtype: torch.dtype
) -> None:
    """Through the hook's buffer and the message, for SAEs that are more than a threshold."""
    import sae_lens

    more = {"k": 12} if kind == "TopK" else {}
    config = getattr(sae_lens, f"{kind}SAEConfig")
    theirs = getattr(sae_lens, f"{kind}SAE")(
        config(d_in=32, d_sae=256, normalize_activations=normalize, **more)
    )
    randomise(theirs)
    theirs.cfg.metadata.hook_name = "blocks.20.hook_resid_post"
    theirs.save_model(tmp_path)
    sae = load_sae(tmp_path)
    topk = TopKEncoder(sae, make_ranker("activation", width=256), k=4, select_dtype=dtype)
    buffer = rows(40, 32).to(dtype)
    buffer[7] *= 1000  # a sink
    sent: list[Any] = []
    pipeline = new_pipeline(LayerEncoder(20, topk, 500.0), sent)
    at = torch.arange(40)
    step = StepView(["a"], [0, 40], positions=at, token_ids=at, first_positions=[0])
    pipeline.submit(step, [buffer])
    message = sent[0].layers[0]
    index = np.frombuffer(message.index, np.int32).reshape(40, 4)
    activation = np.frombuffer(message.activation, np.float32).reshape(40, 4)
    with torch.no_grad():
        f = theirs.encode(buffer.float())
    best = f.topk(4).values
    sink = torch.zeros(40, dtype=torch.bool)
    sink[7] = True
    assert np.frombuffer(message.sink, np.uint8).tolist() == sink.tolist()
    assert (index[7] == -1).all()
    shown = torch.from_numpy(activation.copy())[~sink]
    torch.testing.assert_close(
        shown, best[~sink], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    if kind == "TopK":
        assert np.frombuffer(message.l0, np.int32).tolist() == (f > 0).sum(dim=1).tolist()
