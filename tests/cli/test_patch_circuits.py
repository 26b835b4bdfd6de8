"""`neuroscope patch` finds what is there: a circuit of known place, and one of a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from neuroscope_vllm.core.patching.record import Patching
from tests.support import circuit
from tests.support.patching import record, record_on_vllm


def compiled_on_vllm(*words: str) -> Patching:
    return record_on_vllm(*words, "--", "--no-enforce-eager")


@pytest.mark.parametrize("run", [record, compiled_on_vllm])
def test_the_circuit_that_was_planted_is_found(
    tmp_path: Path, one_thread: None, run: Callable[..., Patching]
) -> None:
    model = circuit.write_circuit(tmp_path / "circuit")
    words = ("--answer", "Paris", "--wrong", "Rome", "--model", str(model), "--positions", "all")
    found = run(circuit.CLEAN, circuit.CORRUPTED, *words)
    carriers = {0: circuit.COUNTRY, 1: circuit.MIDDLE, 2: circuit.LAST, 3: circuit.LAST}
    for row in found.rows:
        expected = np.zeros(8)
        expected[carriers[row.layer]] = 1.0
        assert row.recovered == pytest.approx(expected, abs=1e-3), row.layer
        assert row.recovered_of_all == pytest.approx(1.0, abs=1e-3)
    (top, *others) = record(circuit.CLEAN, circuit.CORRUPTED, *words, "--layers", "1").strongest()
    assert (top.row.layer, top.column.position) == (1, circuit.MIDDLE)
    assert max(abs(cell.recovered) for cell in others) < 1e-3


def test_the_one_feature_that_carries_it_is_found(tmp_path: Path, one_thread: None) -> None:
    model = circuit.write_circuit(tmp_path / "circuit")
    sae = circuit.write_circuit_sae(tmp_path / "layer_1")
    words = ("--answer", "Paris", "--wrong", "Rome", "--model", str(model), "--kind", "features")
    words = (*words, "--sae", str(sae), "--features", "0-31", "--each")
    (top, *others) = record(circuit.CLEAN, circuit.CORRUPTED, *words).strongest()
    assert (top.row.features, top.column.position) == ([circuit.FEATURE], circuit.MIDDLE)
    assert top.recovered == pytest.approx(1.0, abs=1e-3)
    assert max(abs(cell.recovered) for cell in others) < 1e-3
    assert len(others) == 32 * 4 - 1


def test_the_demo_on_capital_cities() -> None:
    """Which country it is stays with its word for most layers, and is then read at the end."""
    words = ("The capital of France is", "The capital of Italy is", "--answer", " Paris")
    found = record(*words, "--wrong", " Rome", "--layers", "0,10,20,25,29")
    country, last = zip(*(row.recovered for row in found.rows), strict=True)
    print("\nlayer  Italy←France  is")
    for row in found.rows:
        print(f"{row.layer:5}  {row.recovered[0]:12.3f}  {row.recovered[1]:.3f}")
    assert [column.position for column in found.columns] == [3, 4]
    assert found.metric_of_clean > 3
    assert found.metric_of_corrupted < -3
    assert min(country[:3]) > 0.9 > 0.1 > max(map(abs, last[:3]))
    assert min(last[3:]) > 0.9 > 0.1 > max(map(abs, country[3:]))
    for row in found.rows:
        assert row.recovered_of_all == pytest.approx(1.0, abs=1e-3)
    words = (*words, "--wrong", " Rome", "--kind", "features")
    features = record(*words)
    (row,) = features.rows
    print(f"all features of layer 20: {row.recovered}")
    assert features.strongest()[0].column.position == 3
    assert 0.25 < row.recovered[0] < 1.1
