"""Many rows at once: the firings, what they decode to, how well; against the dense definition."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.info import LAYER_NORM, RMS, SAEInfo
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sae.sparse import (
    Firings,
    Reconstruction,
    count_firings,
    decode_sparse,
    encode_sparse,
)
from tests.core.conftest import build_rows, build_sae


class Case(NamedTuple):
    sae: SAE
    x: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """An SAE of small whole numbers and rows for it: sums of them are exact in any order."""
    d_model, width, n = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def whole(*shape: int, low: int = -3) -> Tensor:
        return torch.randint(low, 4, shape, generator=generator).float()

    info = SAEInfo(
        source="test",
        format="saelens",
        architecture="jumprelu",
        d_model=d_model,
        width=width,
        k=draw(st.none() | st.integers(1, width)),
    )
    threshold = whole(width, low=-1)
    parameters = (whole(d_model, width), whole(width), threshold, whole(width, d_model))
    return Case(SAE(*parameters, whole(d_model), info), whole(n, d_model))


def dense(firings: Firings, n: int, width: int) -> Tensor:
    f = torch.zeros(n, width)
    f[firings.row, firings.feature] = firings.activation
    return f


def firings_of(f: Tensor) -> Firings:
    row, feature = f.nonzero().unbind(1)
    return Firings(row, feature, f[row, feature])


@given(case=cases(), max_chunk_bytes=st.integers(1, 2000))
def test_firings_are_the_entries_of_the_dense_encode_whatever_the_chunks(
    case: Case, max_chunk_bytes: int
) -> None:
    firings = encode_sparse(case.sae, case.x, max_chunk_bytes=max_chunk_bytes)
    for ours, want in zip(firings, firings_of(case.sae.encode(case.x)), strict=True):
        assert ours.dtype == want.dtype
        assert torch.equal(ours, want)
    assert (firings.activation > 0).all()
    count = count_firings(case.sae, case.x, max_chunk_bytes=max_chunk_bytes)
    assert count == len(firings.row)


@given(case=cases())
def test_they_decode_as_the_dense_ones_do(case: Case) -> None:
    firings = encode_sparse(case.sae, case.x)
    decoded = decode_sparse(case.sae, firings, len(case.x))
    assert torch.equal(decoded, case.sae.decode(case.sae.encode(case.x)))


@given(case=cases(), seed=st.integers(0, 2**31), factor=st.integers(1, 5))
def test_decoding_is_linear_beyond_the_bias(case: Case, seed: int, factor: int) -> None:
    sae, n = case.sae, len(case.x)
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 3, (n, sae.width), generator=draw).float() for _ in range(2))

    def without_bias(f: Tensor) -> Tensor:
        return decode_sparse(sae, firings_of(f), n) - sae.b_dec

    both = without_bias(factor * a + b)
    assert torch.equal(both, factor * without_bias(a) + without_bias(b))


@given(case=cases(), cuts=st.lists(st.integers(0, 9), max_size=3), max_chunk_bytes=st.integers(1))
def test_reconstructions_of_shards_merge_into_that_of_the_whole(
    case: Case, cuts: list[int], max_chunk_bytes: int
) -> None:
    whole = Reconstruction.empty(case.sae.d_model)
    whole.update(case.sae, case.x)
    merged = Reconstruction.empty(case.sae.d_model)
    for shard in reversed(torch.tensor_split(case.x, sorted(cuts))):
        one = Reconstruction.empty(case.sae.d_model)
        one.update(case.sae, shard, max_chunk_bytes=max_chunk_bytes)
        merged = one.merge(merged)
    # Whole numbers again, so to the bit.
    for name in ("num_rows", "num_firings", "squared_error"):
        assert getattr(merged, name) == getattr(whole, name)
    for name in ("total", "total_square"):
        assert torch.equal(getattr(merged, name), getattr(whole, name))
    assert merged.l0 == whole.l0
    assert merged.fvu == whole.fvu or math.isnan(whole.fvu)


@settings(max_examples=20)
@given(
    input_norm=st.sampled_from([None, RMS, LAYER_NORM]),
    k=st.sampled_from([None, 7]),
    chunk_rows=st.integers(1, 80),
)
def test_a_real_ones_figures_are_the_dense_ones(
    input_norm: str | None, k: int | None, chunk_rows: int
) -> None:
    sae = build_sae(32, 256, threshold=1.0)
    sae = replace(sae, info=msgspec.structs.replace(sae.info, input_norm=input_norm, k=k))
    x = build_rows(sae, 80) + 3.0  # a mean, which the variance does not count
    x[11] = 0.0
    f = sae.encode(x)
    decoded = sae.decode(f, of=x)
    firings = encode_sparse(sae, x, max_chunk_bytes=chunk_rows * 6 * 256)
    torch.testing.assert_close(dense(firings, 80, 256), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_sparse(sae, firings, 80, of=x), decoded, rtol=1e-4, atol=1e-3)
    want = (x - decoded).double().square().sum() / (x - x.mean(dim=0)).double().square().sum()
    fit = Reconstruction.empty(32)
    fit.update(sae, x, max_chunk_bytes=chunk_rows * 6 * 256)
    assert fit.fvu == pytest.approx(float(want), rel=1e-5)
    assert fit.explained_variance == 1.0 - fit.fvu
    assert fit.l0 == pytest.approx(float((f > 0).sum() / 80), abs=0.05)
    assert sae.fvu(x) == pytest.approx(fit.fvu, rel=1e-6)
    assert sae.l0(x) == pytest.approx(fit.l0, abs=0.05)


def test_a_row_that_is_no_number_fires_nothing_and_harms_no_other() -> None:
    for k in (None, 5):
        sae = build_sae()
        sae = replace(sae, info=msgspec.structs.replace(sae.info, k=k))
        x = build_rows(sae, 8)
        want = sae.encode(x)
        x[2, 3], x[5] = float("nan"), float("nan")
        want[2], want[5] = 0.0, 0.0
        f = dense(encode_sparse(sae, x), 8, sae.width)
        torch.testing.assert_close(f, want, rtol=1e-5, atol=1e-4)


def test_rows_already_decoded_are_added_as_they_are() -> None:
    sae = build_sae()
    x = build_rows(sae, 30)
    firings = encode_sparse(sae, x)
    added, updated = Reconstruction.empty(64), Reconstruction.empty(64)
    added.add(x, decode_sparse(sae, firings, 30), len(firings.row))
    updated.update(sae, x)
    assert (added.fvu, added.l0) == (updated.fvu, updated.l0)


def test_no_rows_have_no_firings_and_no_variance() -> None:
    sae = build_sae()
    firings = encode_sparse(sae, torch.zeros(0, 64))
    assert [column.shape for column in firings] == [(0,)] * 3
    assert decode_sparse(sae, firings, 0).shape == (0, 64)
    assert torch.equal(decode_sparse(sae, firings, 2), sae.b_dec.expand(2, 64))
    assert math.isnan(Reconstruction.empty(64).fvu)
    assert Reconstruction.empty(64).l0 == sae.l0(torch.zeros(0, 64)) == 0


@pytest.mark.parametrize("input_norm", [RMS, LAYER_NORM])
def test_normalised_rows_are_needed_to_decode(
    make_sae: Callable[..., SAE], input_norm: str
) -> None:
    sae = make_sae()
    sae = replace(sae, info=msgspec.structs.replace(sae.info, input_norm=input_norm))
    with pytest.raises(SAEError, match="activations alone do not say how large a row was"):
        decode_sparse(sae, encode_sparse(sae, torch.ones(1, 64)), 1)


def test_a_transcoder_has_no_variance_of_its_input(make_sae: Callable[..., SAE]) -> None:
    sae = make_sae()
    sae = replace(sae, info=msgspec.structs.replace(sae.info, output_point="mlp"))
    with pytest.raises(SAEError, match="predicts mlp from resid_post"):
        Reconstruction.empty(64).update(sae, torch.zeros(1, 64))


def test_8192_rows_at_width_131072_take_less_than_2_gb_beyond_the_weights() -> None:
    words = ["bench", "memory", "--width", "131072", "--rows", "8192", "--d-model", "32", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "neuroscope_vllm.cli", *words], stdout=subprocess.PIPE, check=True
    )
    ways = json.loads(done.stdout)["ways"]
    assert set(ways) == {"top_k", "sparse", "reconstruction"}
    for figures in ways.values():
        assert 0 < figures["peak_mb"] < 2e9 / 2**20
        assert figures["ms_per_row"] > 0
