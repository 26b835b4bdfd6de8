"""Virtual weights and their weightings against loops over all pairs, however they are cut."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from neuroscope_vllm.core.causal import (
    INPUTS,
    OUTPUTS,
    JointFirings,
    LayerFirings,
    Pair,
    blocks,
    check_pair,
    firings,
    strongest,
)
from neuroscope_vllm.core.causal.agreement import agreements, weightings
from neuroscope_vllm.core.causal.edges import BY, TWERA, WEIGHT, Edges
from neuroscope_vllm.core.causal.pair import CELL_BYTES
from neuroscope_vllm.core.causal.store import Observation, load_firings, save_firings
from neuroscope_vllm.core.errors import ConfigError, SAEError
from neuroscope_vllm.core.sae.info import LAYER_NORM, RMS, SAEInfo
from neuroscope_vllm.core.sae.sae import SAE

TOKENS = 32
"""A power of two, so that means are exact and equal scores are equal to the bit."""


def sae_of(W_dec: Tensor, W_enc: Tensor, **info: Any) -> SAE:
    width, d_model = W_dec.shape
    known = {"source": "made", "format": "saelens", "architecture": "standard"} | info
    zeros = torch.zeros(width)
    return SAE(
        W_enc, zeros, zeros, W_dec, torch.zeros(d_model),
        SAEInfo(**known, d_model=d_model, width=width),
    )  # fmt: skip


class Case:
    """A pair of small whole numbers, so that many edges tie, and what both did on some tokens."""

    def __init__(self, seed: int, lower: int, upper: int, d_model: int) -> None:
        draw = np.random.default_rng(seed)

        def matrix(*shape: int) -> Tensor:
            return torch.tensor(draw.integers(-2, 3, shape), dtype=torch.float32)

        self.pair = Pair(
            sae_of(matrix(lower, d_model), matrix(d_model, lower)),
            sae_of(matrix(upper, d_model), matrix(d_model, upper)), 3, 7,
        )  # fmt: skip
        self.a, self.b = (
            draw.choice([0, 0, 0, 1, 2, 3], (TOKENS, width)).astype(np.float64)
            for width in (lower, upper)
        )
        self.firings = JointFirings(layer_of(self.a), layer_of(self.b), lower, upper)

    def brute(self, by: str, cosine: float | None) -> list[dict[str, float]]:
        """Every edge, strongest first."""
        W_dec, W_enc = self.pair.lower.W_dec.numpy(), self.pair.upper.W_enc.numpy()
        later = self.pair.upper.W_dec.numpy()
        found = []
        for i in range(self.a.shape[1]):
            for j in range(self.b.shape[1]):
                a, b = self.a[:, i], self.b[:, j]
                V = float(W_dec[i] @ W_enc[:, j])
                size = np.linalg.norm(W_dec[i]) * np.linalg.norm(later[j])
                found.append({
                    "lower": i,
                    "upper": j,
                    "weight": V,
                    "cosine": float(W_dec[i] @ later[j] / size) if size else 0.0,
                    "era": float(np.float32(a[b > 0].sum() / TOKENS) * np.float32(V)),
                    "twera": float(np.float32((a * b).sum() / TOKENS / (b.mean() or 1.0)))
                    * V,
                    "together": int(((a > 0) & (b > 0)).sum()),
                })  # fmt: skip
        kept = [e for e in found if e[by] and (cosine is None or e["cosine"] <= cosine)]
        return sorted(kept, key=lambda e: (-np.float32(abs(e[by])), e["lower"], e["upper"]))


def layer_of(dense: NDArray[np.float64]) -> LayerFirings:
    token, feature = np.nonzero(dense)
    start = np.searchsorted(token, np.arange(len(dense) + 1))
    return LayerFirings(
        torch.tensor(start),
        torch.tensor(feature, dtype=torch.int32),
        torch.tensor(dense[token, feature], dtype=torch.float32),
    )


def assert_same(found: Edges, wanted: list[dict[str, float]]) -> None:
    rows = [dict(zip(Edges._fields, row, strict=True)) for row in zip(*found, strict=True)]
    assert [(r["lower"], r["upper"]) for r in rows] == [(e["lower"], e["upper"]) for e in wanted]
    for row, edge in zip(rows, wanted, strict=True):
        assert row == pytest.approx(edge, rel=1e-6, abs=1e-6)


sizes = st.integers(1, 9)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(sizes, sizes, st.integers(1, 5)),
    by=st.sampled_from(BY),
    k=st.integers(1, 12),
    columns_at_once=st.integers(1, 10),
    cosine=st.sampled_from([None, 0.37, -0.01]),
)
def test_the_strongest_edges_are_those_of_a_loop(
    seed: int,
    shape: tuple[int, int, int],
    by: str,
    k: int,
    columns_at_once: int,
    cosine: float | None,
) -> None:
    case = Case(seed, *shape)
    wanted = case.brute(by, cosine)
    max_bytes = columns_at_once * CELL_BYTES * shape[0]
    common: Any = {"by": by, "firings": case.firings, "max_cosine": cosine, "max_bytes": max_bytes}
    assert_same(strongest(case.pair, k, **common), wanted[:k])
    for of_each, end in ((INPUTS, "upper"), (OUTPUTS, "lower")):
        by_end = sorted(wanted, key=lambda e: e[end])
        each = [e for _, some in groupby(by_end, key=lambda e: e[end]) for e in list(some)[:k]]
        assert_same(strongest(case.pair, k, of_each=of_each, **common), each)
    one = seed % shape[1]
    fed = [e for e in wanted if e["upper"] == one][:k]
    column = torch.tensor([one])
    assert_same(strongest(case.pair, k, of_each=INPUTS, columns=column, **common), fed)
    one = seed % shape[0]
    feeds = [e for e in wanted if e["lower"] == one][:k]
    row = torch.tensor([one])
    assert_same(strongest(case.pair, k, of_each=OUTPUTS, rows=row, **common), feeds)


def test_no_block_is_larger_than_was_allowed() -> None:
    case = Case(0, 7, 23, 4)
    cells = [b.weight.numel() for b in blocks(case.pair, max_bytes=3 * 7 * CELL_BYTES)]
    assert max(cells) == 3 * 7
    assert sum(cells) == 7 * 23
    assert [b.weight.shape[1] for b in blocks(case.pair, max_bytes=0)] == [1] * 23


@pytest.mark.parametrize("joined", [1, 3, 50])
def test_sums_do_not_depend_on_how_many_firings_are_joined(
    joined: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(1, 8, 6, 3)
    monkeypatch.setattr(firings, "JOINED", joined)
    assert_same(strongest(case.pair, 99, by=TWERA, firings=case.firings), case.brute(TWERA, None))


def test_without_firings_there_are_weights_alone() -> None:
    case = Case(2, 5, 5, 3)
    found = strongest(case.pair, 3)
    assert np.isnan(found.era).all()
    assert np.isnan(found.twera).all()
    assert (found.together == -1).all()


def test_features_that_never_fire_have_no_weighted_edges() -> None:
    case = Case(3, 4, 4, 3)
    empty = LayerFirings(torch.zeros(TOKENS + 1, dtype=torch.int64), *case.firings.upper[1:])
    nothing = LayerFirings(empty.start, empty.feature[:0], empty.activation[:0])
    silent = JointFirings(case.firings.lower, nothing, 4, 4)
    assert len(strongest(case.pair, 9, by=TWERA, firings=silent).lower) == 0
    assert len(strongest(case.pair, 9, by=WEIGHT, firings=silent).lower) > 0


def test_a_planted_circuit_is_found_behind_what_merely_persists() -> None:
    """Feature 4 writes what feature 9 reads, and 9 writes elsewhere; all others keep what is."""
    d_model, draw = 48, torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=draw))[0]
    written, read, after = basis[:16].clone(), basis[:16].T.clone() * 2, basis[:16].clone()
    read[:, 9], after[9] = basis[4], basis[40]
    pair = Pair(sae_of(written, written.T), sae_of(after, read), 0, 1)
    first = strongest(pair, 15)
    assert first.lower.tolist() == first.upper.tolist()
    assert first.cosine.tolist() == pytest.approx([1.0] * 15, abs=1e-5)
    found = strongest(pair, 1, max_cosine=0.5)
    assert (found.lower[0], found.upper[0]) == (4, 9)
    assert found.weight[0] == pytest.approx(1.0, abs=1e-5)


def test_the_correlation_of_a_weighting_with_itself_is_one() -> None:
    case = Case(4, 6, 9, 5)
    found = weightings(case.pair, case.firings, torch.tensor([1, 4]))
    assert set(found) == {"weight", "cosine", "era", "twera", "co-firing"}
    wanted = {(e["lower"], e["upper"]): e for e in case.brute(WEIGHT, None)}
    for row, lower in enumerate((1, 4)):
        for upper in range(9):
            twera = wanted.get((lower, upper), {"twera": 0.0})["twera"]
            assert float(found["twera"][row, upper]) == pytest.approx(twera, abs=1e-5)
    everything = torch.ones(2, 9, dtype=torch.bool)
    same = agreements(found, -found["weight"], everything)["weight"]
    assert (same.within, same.pooled, same.pairs) == pytest.approx((-1.0, -1.0, 18))
    half = everything.clone()
    half[0] = False
    assert agreements(found, found["weight"], half)["weight"].pairs == 9


def info(**changes: Any) -> SAEInfo:
    known = {"source": "S", "format": "saelens", "architecture": "topk", "d_model": 8, "width": 16}
    return SAEInfo(**(known | changes))


@pytest.mark.parametrize(
    ("infos", "sae_input", "error", "said"),
    [
        ({3: info()}, "raw", ConfigError, "1 SAEs are given"),
        ({3: info(), 4: info(), 5: info()}, "raw", ConfigError, "give --sae twice"),
        ({3: info(), 4: info(d_model=9)}, "raw", SAEError, "size 8 and SAE S of 9"),
        ({3: info(layer=2), 4: info()}, "raw", SAEError, "trained on layer 2"),
        ({3: info(input_norm=RMS), 4: info()}, "raw", SAEError, "constant_norm_rescale"),
        ({3: info(), 4: info(input_norm=LAYER_NORM)}, "raw", SAEError, "layer_norm"),
        ({3: info(), 4: info()}, "rms", SAEError, "rms"),
        ({3: info(output_point="mlp_out"), 4: info()}, "raw", SAEError, "predicts mlp_out"),
        ({3: info(), 4: info(hook_point="mlp_out")}, "raw", SAEError, "reads mlp_out"),
    ],
)
def test_what_can_not_be_traced_is_refused(
    infos: dict[int, SAEInfo], sae_input: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        check_pair(infos, sae_input)


def test_the_order_of_the_saes_does_not_matter() -> None:
    assert check_pair({20: info(), 3: info()}) == (3, 20)


def observed(case: Case) -> Observation:
    return Observation(
        lower_digest=case.pair.lower.digest, upper_digest=case.pair.upper.digest, model="m",
        corpus="c", created="2026-01-01", sequences=1, tokens=TOKENS, left_out=0,
    )  # fmt: skip


def test_firings_come_back_as_they_were_kept(tmp_path: Any) -> None:
    case = Case(5, 6, 4, 3)
    save_firings(tmp_path / "f", case.firings, observed(case))
    found, observation = load_firings(tmp_path / "f", case.pair)
    assert observation == observed(case)
    for one, other in ((found.lower, case.firings.lower), (found.upper, case.firings.upper)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"feature": torch.full((1,), 99, dtype=torch.int32)}, "features that the SAE has not"),
        ({"activation": torch.full((1,), float("nan"))}, "activations that are none"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, "do not add up"),
        ({"activation": torch.zeros(1, dtype=torch.float64)}, "another kind"),
    ],
)
def test_damaged_firings_are_refused(tmp_path: Any, change: dict[str, Tensor], said: str) -> None:
    case = Case(5, 6, 4, 3)

    def spoilt(name: str, tensor: Tensor) -> Tensor:
        if name not in change or name == "start" or change[name].dtype != tensor.dtype:
            return change.get(name, tensor)
        return torch.cat([tensor[:-1], change[name]])

    upper = LayerFirings(**{n: spoilt(n, t) for n, t in case.firings.upper._asdict().items()})
    save_firings(tmp_path / "f", JointFirings(case.firings.lower, upper, 6, 4), observed(case))
    with pytest.raises(ConfigError, match=said):
        load_firings(tmp_path / "f", case.pair)


def test_other_firings_and_other_files_are_refused(tmp_path: Any) -> None:
    case, other = Case(5, 6, 4, 3), Case(6, 6, 4, 3)
    save_firings(tmp_path / "f", case.firings, observed(case))
    with pytest.raises(ConfigError, match="other weights"):
        load_firings(tmp_path / "f", other.pair)
    (tmp_path / "g").write_bytes(b"{}")
    with pytest.raises(ConfigError, match="can not be used"):
        load_firings(tmp_path / "g", case.pair)
    with pytest.raises(ConfigError, match="can not be used"):
        load_firings(tmp_path / "none", case.pair)
