"""What is encoded on a stream beside the model, of rows that it then overwrites, is what the CPU
encodes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.ranking import make_ranker
from neuroscope_vllm.core.sae import SAE, load_sae
from neuroscope_vllm.core.sae.encoder import TopKEncoder
from neuroscope_vllm.engine.serving.pipeline import EncodePipeline, LayerEncoder
from neuroscope_vllm.engine.serving.step import StepView
from tests.support import models

pytestmark = pytest.mark.gpu
D_MODEL, WIDTH, K = 2304, 16384, 8  # Gemma 2 2B with a 16k SAE
STEPS = (1, 128, 7, 512, 33) * 4


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae") / "layer_20"
    return models.write_saelens_sae(folder, d_model=D_MODEL, width=WIDTH, layer=20, scale=1.5)


def encoder(sae: SAE, device: str, dtype: torch.dtype) -> LayerEncoder:
    ranker = make_ranker("activation", width=WIDTH, device=device)
    topk = TopKEncoder(sae.to(torch.device(device)), ranker, k=K, select_dtype=dtype)
    return LayerEncoder(20, topk, 1000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_the_cpu_encodes(sae_folder: Path, dtype: torch.dtype) -> None:
    sae = load_sae(sae_folder)
    sent: list[wire.StepFeatures] = []
    pipeline = EncodePipeline(
        [encoder(sae, "cuda", dtype)],
        sent.append,
        engine="e",
        num_layers=1,
        device=torch.device("cuda", torch.cuda.current_device()),
        max_pending_rows=sum(STEPS),
    )
    draw = torch.Generator().manual_seed(0)
    residuals = [torch.randn(count, D_MODEL, generator=draw).to(dtype) for count in STEPS]
    residuals[1][5] *= 1000  # a sink
    buffer = torch.empty(max(STEPS), D_MODEL, dtype=dtype, device="cuda")
    at = torch.arange(max(STEPS), device="cuda")
    for count, rows in zip(STEPS, residuals, strict=True):
        buffer[:count].copy_(rows)
        step = StepView(["a"], [0, count], at[:count], at[:count] + 7, [0])
        pipeline.submit(step, [buffer[:count]])
        buffer.fill_(torch.nan)  # the next step's
    deadline = time.monotonic() + 120
    while len(sent) < len(STEPS) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pipeline.counters["rows_encoded"] == sum(STEPS)
    kept = total = 0
    for message, rows in zip(sent, residuals, strict=True):
        same, of = assert_encoded(sae, message, rows)
        kept, total = kept + same, total + of
    # Selected in bfloat16, near-ties may trade the last place.
    assert kept / total >= (0.995 if dtype == torch.bfloat16 else 0.9999)


def assert_encoded(sae: SAE, message: wire.StepFeatures, rows: torch.Tensor) -> tuple[int, int]:
    """Activations are exact, whatever was selected; returns how many belong there, of how many."""
    count = len(rows)
    assert np.frombuffer(message.positions, np.int32).tolist() == list(range(count))
    assert np.frombuffer(message.token_ids, np.int32).tolist() == list(range(7, count + 7))
    (layer,) = message.layers
    index = torch.from_numpy(np.frombuffer(layer.index, np.int32).reshape(count, K).astype(int))
    activation = torch.from_numpy(
        np.frombuffer(layer.activation, np.float32).reshape(count, K).copy()
    )
    sink = rows.float().norm(dim=1) > 1000
    assert np.frombuffer(layer.sink, np.uint8).astype(bool).tolist() == sink.tolist()
    assert (index[sink] == -1).all()
    f = sae.encode(rows.float())[~sink]
    found, shown = index[~sink], activation[~sink]
    torch.testing.assert_close(shown, f.gather(1, found), rtol=1e-3, atol=1e-3)
    best = f.topk(K).indices
    return int((found.unsqueeze(2) == best.unsqueeze(1)).any(2).sum()), found.numel()
