"""The canonical SAEs of Gemma Scope, against the list that SAELens publishes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.canonical import CANONICAL_L0, canonical_source, is_canonical

PATH = re.compile(r"layer_(\d+)/width_(\w+)/average_l0_(\d+)")


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    return yaml.safe_load((Path(spec.origin).parent / "pretrained_saes.yaml").read_text())


def releases(published: dict[str, Any], suite: str) -> set[tuple[int, str, int]]:
    """(layer, width, L0) of each SAE of a suite."""
    matches = [PATH.fullmatch(sae["path"]) for sae in published[suite]["saes"]]
    return {(int(m[1]), m[2], int(m[3])) for m in matches if m}


@pytest.mark.parametrize("repository", CANONICAL_L0)
def test_the_table_is_saelens_and_the_closest_to_100(
    published: dict[str, Any], repository: str
) -> None:
    table = {
        (layer, width, l0)
        for width, layers in CANONICAL_L0[repository].items()
        for layer, l0 in layers.items()
    }
    assert table == releases(published, f"{repository}-canonical")
    offered = releases(published, repository)
    for layer, width, l0 in table:
        assert is_canonical(repository, layer, width, l0)
        others = [other for at, wide, other in offered if (at, wide) == (layer, width)]
        assert abs(l0 - 100) == min(abs(other - 100) for other in others)


@pytest.mark.parametrize(
    ("model", "layer", "width", "path"),
    [
        ("google/gemma-2-2b-it", 20, None, "2b-pt-res/layer_20/width_16k/average_l0_71"),
        ("google/gemma-2-2b", 0, None, "2b-pt-res/layer_0/width_16k/average_l0_105"),
        ("google/gemma-2-2b", 20, "65k", "2b-pt-res/layer_20/width_65k/average_l0_114"),
        ("/models/gemma-2-9b-it/", 20, None, "9b-it-res/layer_20/width_16k/average_l0_91"),
        ("google/gemma-2-9b-it", 21, None, "9b-pt-res/layer_21/width_16k/average_l0_129"),
        ("google/gemma-2-9b", 20, None, "9b-pt-res/layer_20/width_16k/average_l0_68"),
        ("google/gemma-2-27b-it", 22, None, "27b-pt-res/layer_22/width_131k/average_l0_82"),
    ],
)
def test_a_model_and_a_layer_are_enough(
    model: str, layer: int, width: str | None, path: str
) -> None:
    assert canonical_source(model, layer, width) == f"hf://google/gemma-scope-{path}"


@pytest.mark.parametrize(
    ("model", "layer", "width", "says"),
    [
        ("meta-llama/Llama-3.1-8B", 20, None, "has no SAE of meta-llama/Llama-3.1-8B; serve a Gem"),
        ("google/gemma-2-2b", 26, None, "no SAE of width 16k on layer 26 of .* layers .* are 0, 1"),
        ("google/gemma-2-27b", 20, None, "of width 131k on layer 20 of .* are 10, 22, 34, and its"),
        ("google/gemma-2-2b", 20, "8k", "of that width are none, and its widths 16k, 65k, 32k"),
    ],
)
def test_what_there_is_not_is_refused(model: str, layer: int, width: str | None, says: str) -> None:
    with pytest.raises(SAEError, match=says):
        canonical_source(model, layer, width)
