"""Statistics against numpy, and merging against having seen everything at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from neuroscope_vllm.core.calibration import (
    KEY,
    NUM_BINS,
    SINK_MULTIPLE,
    Calibration,
    activation_position,
    edges,
)
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae.sparse import Reconstruction, firings_of

WIDTH = 6
HEADER = ("tokens", "sinks", "sink_norm", "sae", "sae_digest", "sae_input", "model", "corpus")
TENSORS = ("firings", "total", "total_square", "maximum", "histogram", "norm_histogram")


def activations(n: int, seed: int = 0) -> torch.Tensor:
    """[n, WIDTH]: half zeros, the rest over the histogram and beyond; feature 0 never fires."""
    draw = torch.Generator().manual_seed(seed)
    value = torch.exp2(torch.rand(n, WIDTH, generator=draw) * 20 - 6)
    value *= torch.rand(n, WIDTH, generator=draw) < 0.5
    value[:, 0] = 0
    return value


def measured(*batches: torch.Tensor) -> Calibration:
    calibration = Calibration.empty(WIDTH)
    for batch in batches:
        calibration.update(len(batch), firings_of(batch.float()))
        calibration.update_norms(batch.norm(dim=1) + 1)
    return calibration


def test_statistics_are_those_of_numpy() -> None:
    f = activations(500)
    calibration = measured(f)
    array = f.double().numpy()
    assert calibration.tokens == 500
    np.testing.assert_array_equal(calibration.firings, (array > 0).sum(axis=0))
    np.testing.assert_allclose(calibration.frequency, (array > 0).mean(axis=0))
    np.testing.assert_allclose(calibration.mean, array.mean(axis=0))
    np.testing.assert_allclose(calibration.std, array.std(axis=0), rtol=1e-9)
    np.testing.assert_array_equal(calibration.maximum, array.max(axis=0))


def test_the_histogram_counts_firings_between_its_edges() -> None:
    f = activations(500)
    histogram = measured(f).histogram
    limits = edges().numpy()
    limits[0], limits[-1] = 0.0, np.inf
    limits = np.delete(limits, -2)
    for feature in range(1, WIDTH):
        fired = f[:, feature][f[:, feature] > 0].numpy()
        np.testing.assert_array_equal(histogram[feature], np.histogram(fired, limits)[0])


def test_positions_are_whole_at_edges_and_safe_for_anything() -> None:
    inner = edges()[1:-1].float()
    assert activation_position(inner).tolist() == list(range(1, NUM_BINS + 1))
    strange = torch.tensor([0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-30, 1e30])
    assert activation_position(strange).tolist() == [0, 0, 0, NUM_BINS, 0, 0, NUM_BINS]


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order_equals_the_whole(sizes: list[int], random) -> None:
    f = activations(sum(sizes))
    shards = [measured(part) for part in f.split(sizes)] if sum(sizes) else [measured(f)]
    while len(shards) > 1:
        random.shuffle(shards)
        shards.append(shards.pop().merge(shards.pop()))
    whole = measured(f)
    assert shards[0].tokens == whole.tokens
    for name in TENSORS:
        ours, theirs = getattr(shards[0], name), getattr(whole, name)
        exact = not ours.dtype.is_floating_point or name == "maximum"
        torch.testing.assert_close(ours, theirs, rtol=0 if exact else 1e-12, atol=0)


def test_merging_leaves_both_as_they_were() -> None:
    first, second = measured(activations(5)), measured(activations(7, seed=1))
    first.merge(second).firings.add_(1)
    assert (first.tokens, second.tokens) == (5, 7)
    torch.testing.assert_close(first.firings, measured(activations(5)).firings)


@pytest.mark.parametrize("name", ["sae", "sae_digest", "sae_input", "model", "corpus"])
def test_measurements_of_different_things_do_not_merge(name: str) -> None:
    with pytest.raises(ConfigError, match=f"calibrations of {name} 'a' and {name} 'b' cannot be"):
        Calibration.empty(4, **{name: "a"}).merge(Calibration.empty(4, **{name: "b"}))


def test_widths_must_agree() -> None:
    with pytest.raises(ConfigError, match="calibrations of width 4 and width 5 cannot be merged"):
        Calibration.empty(4).merge(Calibration.empty(5))
    with pytest.raises(ConfigError, match=r"feature \d were given to a calibration of 4 features"):
        Calibration.empty(4).update(2, firings_of(activations(2)))


def test_the_median_norm_is_good_to_one_percent_and_ignores_sinks() -> None:
    norms = torch.exp(torch.randn(2001, generator=torch.Generator().manual_seed(0)) * 0.3 + 5)
    norms[:20] *= 50
    calibration = Calibration.empty(WIDTH)
    calibration.update_norms(norms)
    assert calibration.median_norm == pytest.approx(float(norms.median()), rel=0.011)
    assert (norms > SINK_MULTIPLE * calibration.median_norm).sum() == 20


def test_an_empty_calibration_divides_by_nothing() -> None:
    empty = Calibration.empty(3)
    for column in (empty.frequency, empty.mean, empty.std):
        assert column.tolist() == [0, 0, 0]
    assert (empty.median_norm, empty.sink_norm) == (0.0, float("inf"))
    empty.update_norms(torch.tensor([0.0, float("inf")]))
    assert empty.norm_histogram.sum() == 2


def test_bf16_activations_are_counted_as_they_are() -> None:
    f = activations(50).bfloat16()
    np.testing.assert_allclose(measured(f).total, f.double().sum(dim=0))


def full(tokens: int = 30) -> Calibration:
    """With every field filled."""
    calibration = measured(activations(tokens))
    calibration.sae, calibration.sae_input, calibration.model = "s", "rms", "m"
    calibration.sae_digest = "d"
    calibration.corpus, calibration.created = "wikitext", "2026-01-02"
    calibration.sinks, calibration.sink_norm = 3, 1432.4321
    calibration.reconstruction = Reconstruction.empty(4)
    x = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(0))
    calibration.reconstruction.add(x, x * 0.9, int(calibration.firings.sum()))
    return calibration


def assert_equal(first: Calibration, second: Calibration) -> None:
    """To the bit."""
    for name in TENSORS:
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)
    for name in (*HEADER, "created"):
        assert getattr(first, name) == getattr(second, name), name
    assert (first.reconstruction is None) == (second.reconstruction is None)
    if first.reconstruction is not None and second.reconstruction is not None:
        assert first.reconstruction.squared_error == second.reconstruction.squared_error
        assert first.reconstruction.fvu == second.reconstruction.fvu
        assert first.reconstruction.l0 == second.reconstruction.l0


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "c.safetensors"
    full().save(path)
    assert_equal(Calibration.load(path), full())
    measured(activations(5)).save(path)
    assert_equal(Calibration.load(path), measured(activations(5)))
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]


def test_the_same_statistics_are_the_same_bytes() -> None:
    assert len({full().to_bytes() for _ in range(20)}) == 1


def test_the_reconstruction_merges_where_both_have_one() -> None:
    whole = full().merge(full())
    assert whole.reconstruction is not None
    assert whole.reconstruction.fvu == pytest.approx(0.01, rel=0.1)
    assert full().merge(replace(full(), reconstruction=None)).reconstruction is None


@settings(max_examples=200)
@given(st.binary(max_size=200) | st.integers(0, 9999))
def test_damaged_files_are_refused(damage: bytes | int) -> None:
    data = full().to_bytes()
    broken = damage if isinstance(damage, bytes) else data[: damage % len(data)]
    with pytest.raises(ConfigError):
        Calibration.from_bytes(broken)


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("total", torch.full((WIDTH,), float("nan"), dtype=torch.float64), "not finite"),
        ("firings", torch.full((WIDTH,), -1), "negative"),
        ("maximum", torch.zeros(WIDTH, dtype=torch.float64), "its maximum is torch.float64"),
        ("histogram", torch.zeros(WIDTH, 3, dtype=torch.int64), r"its histogram is .* \[6, 3\]"),
        ("norm_histogram", None, "no tensor 'norm_histogram'"),
    ],
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, why: str
) -> None:
    path = tmp_path / "c.safetensors"
    full().save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), path, metadata)
    with pytest.raises(ConfigError, match=f"c.safetensors can not be used: .*{why}"):
        Calibration.load(path)


def test_other_files_are_not_calibrations(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(ConfigError, match=r"can not be read \(No such file.*neuroscope calibrate"):
        Calibration.load(path)
    path.write_text("hello")
    with pytest.raises(ConfigError, match="it is not a safetensors file"):
        Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="it is of version none, not 2"):
        Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path, {KEY: '{"version": 7}'})
    with pytest.raises(ConfigError, match="it is of version 7, not 2"):
        Calibration.load(path)
