"""The canonical SAEs of Gemma Scope, against the list that SAELens publishes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.canonical import (
    CANONICAL_L0,
    LAYERS_2,
    WIDTHS_2,
    canonical_source,
    canonical_sources,
    neuronpedia_id,
    shown_source,
)

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
        assert neuronpedia_id(f"{repository}/layer_{layer}/width_{width}/average_l0_{l0}")
        others = [other for at, wide, other in offered if (at, wide) == (layer, width)]
        assert abs(l0 - 100) == min(abs(other - 100) for other in others)


@pytest.mark.parametrize("kind", ["pt", "it"])
@pytest.mark.parametrize("size", LAYERS_2)
def test_gemma_scope_2_has_what_saelens_lists(
    published: dict[str, Any], size: str, kind: str
) -> None:
    release = published[f"gemma-scope-2-{size}-{kind}-res"]
    offered = {
        f"hf://{release['repo_id']}/{sae['path']}"
        for sae in release["saes"]
        if re.fullmatch(r"resid_post/layer_\d+_width_[^_]+_l0_medium", sae["path"])
    }
    named = {
        canonical_source(release["model"], layer, width)
        for layer in LAYERS_2[size]
        for width in WIDTHS_2
    }
    assert named == offered


def test_neuronpedias_ids_are_those_that_saelens_records(published: dict[str, Any]) -> None:
    recorded = {
        f"hf://{release['repo_id']}/{sae['path']}": sae["neuronpedia"]
        for name, release in published.items()
        if re.fullmatch(r"gemma-scope-(2-)?\w+-(pt|it)-res(-canonical)?", name)
        for sae in release["saes"]
        if re.search(r"gemmascope-(2-)?res-\d+[km]$", sae.get("neuronpedia") or "")
    }
    assert len(recorded) > 250
    assert {address: neuronpedia_id(address) for address in recorded} == recorded
    assert {shown_source(shown): shown for shown in recorded.values()} == recorded


@pytest.mark.parametrize(
    "identifier",
    [
        "gemma-2-2b-it/20-gemmascope-res-16k",
        "gemma-2-2b/26-gemmascope-res-16k",
        "gemma-2-2b/20-gemmascope-res-16k__l0-139",
        "gpt2-small/6-res-jb",
    ],
)
def test_what_neuronpedia_does_not_show_has_no_address(identifier: str) -> None:
    assert shown_source(identifier) is None


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
        ("google/gemma-3-270m", 9, None, "2-270m-pt/resid_post/layer_9_width_16k_l0_medium"),
        ("google/gemma-3-1b-pt", 22, "1m", "2-1b-pt/resid_post/layer_22_width_1m_l0_medium"),
        ("/models/gemma-3-4b-it/", 17, None, "2-4b-it/resid_post/layer_17_width_16k_l0_medium"),
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
        ("google/gemma-3-4b-it", 20, None, "of width 16k on layer 20 of .* are 9, 17, 22, 29, and"),
        ("google/gemma-3-1b-it", 7, "8k", "are none, and its widths 16k, 65k, 262k, 1m"),
        ("google/gemma-3n-E4B-it", 9, None, "no SAE of google/gemma-3n-E4B-it; serve a Gemma 2"),
        ("google/gemma-2-2b", 20, "8k", "of that width are none, and its widths 16k, 65k, 32k"),
    ],
)
def test_what_there_is_not_is_refused(model: str, layer: int, width: str | None, says: str) -> None:
    with pytest.raises(SAEError, match=says):
        canonical_source(model, layer, width)


def test_all_layers_of_a_model() -> None:
    tuned = canonical_sources("google/gemma-2-9b-it")
    assert list(tuned) == list(range(42))
    assert {layer for layer, source in tuned.items() if "-it-res" in source} == {9, 20, 31}
    for model in ("google/gemma-2-9b-it", "google/gemma-3-12b-pt", "google/gemma-2-27b"):
        for layer, source in canonical_sources(model).items():
            assert source == canonical_source(model, layer)
    assert list(canonical_sources("google/gemma-3-12b-pt")) == [12, 24, 31, 41]
    with pytest.raises(SAEError, match="has no SAE of gpt2"):
        canonical_sources("gpt2")
