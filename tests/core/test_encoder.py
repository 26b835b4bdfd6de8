"""The hot path against a full fp32 encode, filtered, ranked and sorted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
import torch

from neuroscope_vllm.core.errors import ConfigError, SAEError
from neuroscope_vllm.core.ranking import RANKINGS, make_ranker
from neuroscope_vllm.core.sae import encoder as module
from neuroscope_vllm.core.sae.encoder import TopKEncoder, top_of_blocks
from neuroscope_vllm.core.sae.sae import SAE
from tests.support.encoding import Bench, LargestResult, by_hand, keeping, membership

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SAELens' own imports


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.realistic()


def test_the_rows_are_as_dense_as_gemma_scopes(bench: Bench) -> None:
    l0 = (bench.f > 0).sum(dim=1).float()
    assert 50 < l0.mean() < 110
    assert 0 < bench.ranker("tail").mask.sum() < 200


@pytest.mark.parametrize("k", [1, 8, 20])
@pytest.mark.parametrize("method", RANKINGS)
def test_fp32_selection_is_exact(bench: Bench, method: str, k: int) -> None:
    ranker = bench.ranker(method)
    ours = TopKEncoder(bench.sae, ranker, k).encode(bench.x)
    reference = bench.reference(ranker, k)
    # Scores that agree to fp32 rounding may come in either order.
    torch.testing.assert_close(ours.score, reference.score, rtol=1e-4, atol=1e-4)
    assert membership(ours, reference) > 0.9995
    assert (ours.l0 - reference.l0).abs().max() <= 1
    same = ours.index == reference.index
    torch.testing.assert_close(ours.activation[same], reference.activation[same])


@pytest.mark.parametrize("method", RANKINGS)
def test_bf16_selection_agrees_and_its_values_are_exact(bench: Bench, method: str) -> None:
    ranker = bench.ranker(method)
    ours = TopKEncoder(bench.sae, ranker, select_dtype=torch.bfloat16).encode(bench.x)
    reference = bench.reference(ranker, 8)
    assert membership(ours, reference) >= 0.995
    kept = ours.index >= 0
    true = bench.f.gather(1, ours.index.long().clamp(min=0))
    torch.testing.assert_close(ours.activation[kept], true[kept], rtol=1e-3, atol=0)
    assert (ours.l0 - reference.l0).abs().float().mean() < 1
    assert (ours.score.diff(dim=1)[kept[:, 1:]] <= 0).all()


def test_dense_rows_keep_their_best_in_the_pool(make_sae, make_rows) -> None:
    sae = make_sae(d_model=256, width=2048, threshold=3.0)
    dense = Bench(sae, make_rows(sae, 500))
    ranker = make_ranker("tail", dense.calibration)
    assert (dense.f > 0).sum(dim=1).float().mean() > 2 * module.POOL
    ours = TopKEncoder(sae, ranker).encode(dense.x)
    assert membership(ours, dense.reference(ranker, 8)) >= 0.995


def test_without_oneDNN_the_plain_matmul_agrees(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = bench.ranker("zscore")
    packed = TopKEncoder(bench.sae, ranker).encode(bench.x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = TopKEncoder(bench.sae, ranker).encode(bench.x)
    torch.testing.assert_close(plain.score, packed.score)
    assert membership(plain, packed) > 0.9995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_at_its_threshold_is_not_active(dtype: torch.dtype) -> None:
    encoder = TopKEncoder(
        by_hand(torch.full((8,), 2.0)), make_ranker("activation", width=8), 3, select_dtype=dtype
    )
    out = encoder.encode(torch.tensor([[2.0, 2.5, 0, -3, 0, 0, 4.0, -0.0], [2.0] * 8]))
    assert out.index.tolist() == [[6, 1, -1], [-1, -1, -1]]
    assert out.activation.tolist() == [[4.0, 2.5, 0.0], [0, 0, 0]]
    assert out.score.tolist() == [[4.0, 2.5, 0.0], [0, 0, 0]]
    assert out.l0.tolist() == [2, 0]
    assert not torch.signbit(out.activation).any()
    dtypes = [tensor.dtype for tensor in out]
    assert dtypes == [torch.int32, torch.float32, torch.float32, torch.int32]


def test_thresholds_of_zero_and_below_are_a_relu() -> None:
    threshold = torch.tensor([0.0, -1.0] * 4)
    encoder = TopKEncoder(by_hand(threshold), make_ranker("activation", width=8), 8)
    out = encoder.encode(torch.tensor([[-0.5, -0.5, 0.0, 0.0, 0.5, 1.0, -0.0, -0.0]]))
    assert out.index.tolist() == [[5, 4] + [-1] * 6]
    assert out.l0.tolist() == [2]


def test_masked_features_are_never_shown_but_count(bench: Bench) -> None:
    ranker = make_ranker("activation", bench.calibration, 0.02)
    assert 0 < ranker.mask.sum() < 2048
    for dtype in (torch.float32, torch.bfloat16):
        out = TopKEncoder(bench.sae, ranker, 40, select_dtype=dtype).encode(bench.x)
        shown = out.index[out.index >= 0].long()
        assert not ranker.mask[shown].any()
        assert (out.index < 0).any()  # fewer than 40 are left on some rows
        assert out.l0.sum() == pytest.approx((bench.f > 0).sum().item(), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_dtype_are_valued_in_fp32(bench: Bench, dtype: torch.dtype) -> None:
    x = bench.x[:50].to(dtype)
    out = TopKEncoder(bench.sae, make_ranker("activation", width=2048)).encode(x)
    torch.testing.assert_close(out.activation[:, 0], bench.sae.encode(x).max(dim=1).values)


@pytest.mark.parametrize("method", RANKINGS)
@pytest.mark.parametrize("select_dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_numbers_show_nothing_and_harm_no_other(
    bench: Bench, method: str, select_dtype: torch.dtype
) -> None:
    encoder = TopKEncoder(bench.sae, bench.ranker(method), select_dtype=select_dtype)
    x = bench.x[:4].clone()
    x[1, 3], x[2], x[3] = float("nan"), float("inf"), 0.0
    out = encoder.encode(x)
    torch.testing.assert_close(out.activation[0], encoder.encode(bench.x[:4]).activation[0])
    assert (out.index[1:3] == -1).all()
    assert (out.activation[1:3] == 0).all()


def test_chunks_give_what_one_pass_gives(bench: Bench) -> None:
    ranker = bench.ranker("tail")
    whole = TopKEncoder(bench.sae, ranker).encode(bench.x)
    parts = TopKEncoder(bench.sae, ranker, max_chunk_bytes=1 << 20).encode(bench.x)
    assert membership(whole, parts) > 0.9995
    torch.testing.assert_close(whole.activation.sum(), parts.activation.sum())


def test_no_rows_give_no_rows(bench: Bench) -> None:
    out = TopKEncoder(bench.sae, bench.ranker("tail")).encode(bench.x[:0])
    assert [tuple(tensor.shape) for tensor in out] == [(0, 8), (0, 8), (0, 8), (0,)]


def test_results_are_not_overwritten_by_the_next_call(bench: Bench) -> None:
    encoder = TopKEncoder(bench.sae, make_ranker("activation", width=2048))
    first = encoder.encode(bench.x[:10])
    kept = [tensor.clone() for tensor in first]
    encoder.encode(bench.x[10:20])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize("select_dtype", [torch.float32, torch.bfloat16])
def test_a_wide_sae_stays_within_its_chunk(make_sae, select_dtype: torch.dtype) -> None:
    sae = make_sae(d_model=8, width=131072, threshold=2.0)
    ranker = make_ranker("activation", width=sae.width)
    encoder = TopKEncoder(sae, ranker, select_dtype=select_dtype, max_chunk_bytes=16 << 20)
    with LargestResult() as seen:
        out = encoder.encode(torch.randn(100, 8) * 4)
    assert out.index.shape == (100, 8)
    assert seen.nbytes <= 8 << 20  # the margin and its flags share the chunk


@pytest.mark.parametrize("method", RANKINGS)
def test_nothing_is_read_back_from_the_device(bench: Bench, method: str) -> None:
    encoder = TopKEncoder(bench.sae, bench.ranker(method))
    with LargestResult() as seen:
        encoder.encode(bench.x[:16])
    assert not seen.read_back()


@pytest.mark.parametrize("width", [1, 7, 100, 4096, 6144, 16384])
@pytest.mark.parametrize("m", [1, 16, 100])
def test_top_of_blocks_is_topk(width: int, m: int) -> None:
    m = min(m, width)
    score = torch.randn(33, width, generator=torch.Generator().manual_seed(width))
    values, index = top_of_blocks(score, m)
    assert torch.equal(values.sort(descending=True).values, score.topk(m).values)
    assert torch.equal(score.gather(1, index), values)
    assert all(len(set(row)) == m for row in index.tolist())
    ties = torch.full((3, width), float("-inf"))
    assert all(len(set(row)) == m for row in top_of_blocks(ties, m)[1].tolist())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hook_point": "blocks.2.hook_mlp_out"}, "reads blocks.2.hook_mlp_out, but a server"),
        ({"output_point": "mlp"}, "is a transcoder"),
    ],
)
def test_what_does_not_reconstruct_the_residual_stream_is_refused(
    make_sae: Callable[..., SAE], changes: dict[str, Any], says: str
) -> None:
    sae = make_sae(8, 16)
    sae = replace(sae, info=msgspec.structs.replace(sae.info, **changes))
    with pytest.raises(SAEError, match=says):
        TopKEncoder(sae, make_ranker("activation", width=16))


def test_bad_settings_are_refused(make_sae) -> None:
    sae = make_sae(8, 16)
    build = partial(TopKEncoder, sae, make_ranker("activation", width=16))
    for k in (0, 17):
        with pytest.raises(ConfigError, match=f"top-k {k} is out of range; the SAE has 16"):
            build(k)
    with pytest.raises(ConfigError, match="7 candidates cannot give the top 8; give at least 8"):
        build(8, candidates=7)
    largest = keeping(sae, 12)
    with pytest.raises(ConfigError, match="9 candidates cannot give the top 12"):
        TopKEncoder(largest, make_ranker("activation", width=16), 8, candidates=9)
    with pytest.raises(ConfigError, match="float16 is not float32 or bfloat16"):
        build(8, select_dtype=torch.float16)
    with pytest.raises(ConfigError, match="the ranker has 15 features but the SAE has 16"):
        TopKEncoder(sae, make_ranker("activation", width=15))
