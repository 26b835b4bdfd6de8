"""Statistics against numpy, and merging against having seen everything at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from neuroscope_vllm.core.calibration import NUM_BINS, Calibration, activation_position, edges
from neuroscope_vllm.core.errors import ConfigError

WIDTH = 6
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
        calibration.update(batch)
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


@pytest.mark.parametrize("name", ["sae", "model", "corpus"])
def test_measurements_of_different_things_do_not_merge(name: str) -> None:
    with pytest.raises(ConfigError, match=f"calibrations of {name} 'a' and {name} 'b' cannot be"):
        Calibration.empty(4, **{name: "a"}).merge(Calibration.empty(4, **{name: "b"}))


def test_widths_must_agree() -> None:
    with pytest.raises(ConfigError, match="calibrations of width 4 and width 5 cannot be merged"):
        Calibration.empty(4).merge(Calibration.empty(5))
    with pytest.raises(ConfigError, match="activations of 6 features were given to a calibration"):
        Calibration.empty(4).update(activations(2))


def test_the_median_norm_is_good_to_one_percent_and_ignores_sinks() -> None:
    norms = torch.exp(torch.randn(2001, generator=torch.Generator().manual_seed(0)) * 0.3 + 5)
    norms[:20] *= 50
    calibration = Calibration.empty(WIDTH)
    calibration.update_norms(norms)
    assert calibration.median_norm == pytest.approx(float(norms.median()), rel=0.011)
    assert calibration.sink_norm == 6 * calibration.median_norm
    assert (norms > calibration.sink_norm).sum() == 20


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


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = measured(activations(30))
    saved.sae, saved.model, saved.corpus, saved.created = "s", "m", "wikitext", "2026-01-02"
    saved.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    for name in TENSORS:
        torch.testing.assert_close(getattr(loaded, name), getattr(saved, name), rtol=0, atol=0)
    texts = (loaded.tokens, loaded.sae, loaded.model, loaded.corpus, loaded.created)
    assert texts == (30, "s", "m", "wikitext", "2026-01-02")


def test_other_files_are_not_calibrations(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(ConfigError, match="does not exist; make one with"):
        Calibration.load(path)
    path.write_text("hello")
    with pytest.raises(ConfigError, match="cannot be read"):
        Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"not a calibration of version 1 \(it says nothing\);"):
        Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path, {"neuroscope_calibration": "7"})
    with pytest.raises(
        ConfigError, match=r"not a calibration of version 1 \(it says 7\); make one"
    ):
        Calibration.load(path)
