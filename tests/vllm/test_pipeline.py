"""A step that can not be encoded costs features, counted and shown; the model goes on."""

from __future__ import annotations

from typing import Any

import torch

from neuroscope_vllm.core.ranking import make_ranker
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.sae.encoder import TopKEncoder
from neuroscope_vllm.engine.vllm.pipeline import EncodePipeline, LayerEncoder
from neuroscope_vllm.engine.vllm.step import StepView


def test_failures_are_counted_and_shown_and_pass(tiny_sae: Any) -> None:
    sae = load_sae(tiny_sae)
    topk = TopKEncoder(sae, make_ranker("activation", width=sae.width), k=4)
    encoder = LayerEncoder(20, torch.randn(8, 64) * 10, topk, None, False)
    sent: list[Any] = []
    pipeline = EncodePipeline([encoder], sent.append, engine="e", num_layers=1, max_pending_rows=64)
    rows = torch.arange(3)
    good = StepView(["a"], [0, 3], positions=rows, token_ids=rows)
    bad = StepView(["a"], [0, 3], positions=rows[:1], token_ids=rows)  # does not fit its rows
    pipeline.submit(bad)
    assert pipeline.failing
    assert (pipeline.counters["rows_failed"], sent) == (3, [])
    pipeline.submit(good)
    assert not pipeline.failing
    assert pipeline.counters["rows_encoded"] == 3
    assert [(s.internal_id, s.start, s.stop) for s in sent[0].spans] == [("a", 0, 3)]
