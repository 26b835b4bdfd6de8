"""The hot path for SAEs that are more than a threshold: the k largest of a row, normalised rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neuroscope_vllm.core.ranking import RANKINGS, make_ranker
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.sae.encoder import TopKEncoder
from neuroscope_vllm.core.sae.info import RMS
from neuroscope_vllm.core.sae.sae import SAE
from tests.support.encoding import Bench, LargestResult, by_hand, keeping, membership
from tests.support.saes import randomise, rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SAELens' own imports


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.realistic()


@pytest.fixture(scope="module")
def largest(bench: Bench) -> Bench:
    """A bench whose SAE keeps the 64 largest of each row; its ranker masks a few that are."""
    return Bench(keeping(bench.sae, 64), bench.x, bench.calibration)


@pytest.mark.parametrize(("dtype", "agree"), [(torch.float32, 0.9995), (torch.bfloat16, 0.995)])
@pytest.mark.parametrize("k", [8, 100])
@pytest.mark.parametrize("method", RANKINGS)
def test_the_k_largest_of_a_row_are_ranked_among_themselves(
    largest: Bench, method: str, k: int, dtype: torch.dtype, agree: float
) -> None:
    ranker = largest.ranker(method)
    shown = (largest.f > 0) & ranker.mask
    assert shown.any()  # masked features take places of the 64
    ours = TopKEncoder(largest.sae, ranker, k, select_dtype=dtype).encode(largest.x)
    reference = largest.reference(ranker, k)
    assert membership(ours, reference) >= agree
    assert torch.equal(ours.l0, reference.l0)
    assert (ours.l0 == 64).all()
    kept = ours.index >= 0
    exact = largest.sae.preactivations(largest.x)[0].gather(1, ours.index.long().clamp(min=0))
    torch.testing.assert_close(ours.activation[kept], exact[kept], rtol=1e-5, atol=1e-4)
    assert (ours.score.diff(dim=1)[kept[:, 1:]] <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_k_largest_only_positive_ones_are_active(dtype: torch.dtype) -> None:
    encoder = TopKEncoder(
        keeping(by_hand(torch.zeros(8)), 3),
        make_ranker("activation", width=8),
        4,
        select_dtype=dtype,
    )
    x = torch.tensor(
        [
            [1.0, 2.5, 0, -3, 5, 0, 4.0, -0.0],  # more than three
            [-1.0, -0.0, 0.0, 2.0, -3, -4, -0.0, 1.5],  # fewer
            [-1.0, -0.0, 0.0, -2, -3, -4, -5, -6],  # none
            [2.0] * 8,  # a tie: any three
            [float("nan"), 1, 2, 3, 4, 5, 6, 7],
        ]
    )
    out = encoder.encode(x)
    assert out.index[:3].tolist() == [[4, 6, 1, -1], [3, 7, -1, -1], [-1] * 4]
    assert out.activation[:3].tolist() == [[5.0, 4.0, 2.5, 0.0], [2.0, 1.5, 0, 0], [0] * 4]
    assert out.activation[3].tolist() == [2.0, 2.0, 2.0, 0.0]
    assert len(set(out.index[3, :3].tolist())) == 3
    assert out.index[4].tolist() == [-1] * 4
    assert out.l0.tolist() == [3, 2, 0, 3, 0]
    assert not torch.signbit(out.activation).any()


def test_masked_features_take_a_place_among_the_k_largest() -> None:
    ranker = make_ranker("activation", width=8)
    ranker.mask[4] = True
    encoder = TopKEncoder(keeping(by_hand(torch.zeros(8)), 3), ranker, 3)
    out = encoder.encode(torch.tensor([[1.0, 2.5, 0, -3, 5, 0, 4.0, 2.0]]))
    assert out.index.tolist() == [[6, 1, -1]]
    assert out.l0.tolist() == [3]


def test_near_ties_at_the_last_place_are_decided_in_fp32(make_sae: Callable[..., SAE]) -> None:
    """Eight values that are one in bfloat16, of which five have a place."""
    values = 1.0 + torch.arange(8) * 2.0**-12
    x = torch.cat([values, torch.zeros(8)])[torch.arange(16) * 7 % 16].expand(2, 16)
    eye, zeros = torch.eye(16), torch.zeros(16)
    sae = keeping(SAE(eye, zeros, zeros, eye, zeros, make_sae(16, 16).info), 5)
    ranker = make_ranker("activation", width=16)
    out = TopKEncoder(sae, ranker, 5, select_dtype=torch.bfloat16).encode(x)
    assert out.activation.tolist() == [values.flip(0)[:5].tolist()] * 2


@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", ["TopK", "Standard", "JumpReLU", "Gated"])
def test_saelens_own_encoders_give_the_same(tmp_path: Path, kind: str, normalize: str) -> None:
    import sae_lens

    more = {"k": 12} if kind == "TopK" else {}
    config = getattr(sae_lens, f"{kind}SAEConfig")
    theirs = getattr(sae_lens, f"{kind}SAE")(
        config(d_in=32, d_sae=256, normalize_activations=normalize, **more)
    )
    randomise(theirs)
    theirs.save_model(tmp_path)
    x = rows(d_model=32)
    with torch.no_grad():
        f = theirs.encode(x)
        best = f.topk(8)
    for dtype, agree in ((torch.float32, 0.9995), (torch.bfloat16, 0.98)):
        ranker = make_ranker("activation", width=256)
        out = TopKEncoder(load_sae(tmp_path), ranker, select_dtype=dtype).encode(x)
        same = (out.index[:, :, None] == best.indices[:, None, :]).any(dim=2)
        assert same[best.values > 0].float().mean() > agree
        if kind == "TopK" or dtype == torch.float32:
            assert torch.equal(out.l0, (f > 0).sum(dim=1).int())
        torch.testing.assert_close(out.activation[:, 0], best.values[:, 0], rtol=1e-5, atol=1e-5)
        if dtype == torch.float32:
            torch.testing.assert_close(out.activation, best.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", RANKINGS)
def test_the_k_largest_are_found_without_reading_back_and_in_any_chunks(
    largest: Bench, method: str
) -> None:
    ranker = largest.ranker(method)
    encoder = TopKEncoder(largest.sae, ranker)
    with LargestResult() as seen:
        encoder.encode(largest.x[:16])
    assert not seen.read_back()
    whole = encoder.encode(largest.x)
    parts = TopKEncoder(largest.sae, ranker, max_chunk_bytes=1 << 20).encode(largest.x)
    assert membership(whole, parts) > 0.9995
    assert torch.equal(whole.l0, parts.l0)
    assert encoder.encode(largest.x[:0]).index.shape == (0, 8)


def test_rows_are_normalised_in_each_chunk_and_none_harms_another(bench: Bench) -> None:
    sae = bench.sae.reading_rms()
    assert (sae.info.input_norm, sae.reading_rms()) == (RMS, sae)
    encoder = TopKEncoder(sae, make_ranker("activation", width=2048), max_chunk_bytes=1 << 18)
    x = bench.x[:50] / 16
    norm = x.norm(dim=1, keepdim=True)
    plain = TopKEncoder(bench.sae, make_ranker("activation", width=2048))
    want = plain.encode(x * (256**0.5 / norm))
    assert (want.l0 > 0).any()
    broken = x.clone()
    broken[7], broken[9, 0], broken[30] = 0.0, float("nan"), float("inf")
    out, fine = encoder.encode(broken), torch.ones(50, dtype=torch.bool)
    fine[[7, 9, 30]] = False
    torch.testing.assert_close(out.activation[fine], want.activation[fine], rtol=1e-5, atol=1e-5)
    assert (out.index[~fine] == -1).all()
    assert (out.l0[~fine] == 0).all()
