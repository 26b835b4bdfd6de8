"""Numbers that others published about Gemma 2 2B and Gemma Scope, where both are in the cache.

Nothing is downloaded. Without the weights a test is listed as skipped, with what it lacks; the same
checks then still run on the demo's model and SAE, on numbers of transformers and SAELens.

Sources: Neuronpedia's repository (apps/inference: README.md, tests/model_expectations.yaml) and
candle-mi's (scripts/sae_reference.json); for the ranges arXiv 2408.05147.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import sae_lens
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuroscope_vllm.cli.demo import demo_model, demo_sae
from neuroscope_vllm.core.sae import SAE, load_sae
from neuroscope_vllm.engine.hf.oracle import Oracle

GEMMA = "google/gemma-2-2b"
SCOPE = "google/gemma-scope-2b-pt-res"
LAYER_0 = "layer_0/width_16k/average_l0_105/params.npz"
LAYER_20 = "layer_20/width_16k/average_l0_71/params.npz"

DOGS = 12082
# Of the feature, the largest first. In the first text all other tokens have none.
ABOUT = ("this is about dogs!", {" dogs": 70.5, "!": 48.25})
COUCH = ("My dog is sleeping on the couch.", {" dog": 87.0, " is": 69.5, " the": 49.0})
NEURONPEDIA_ERROR = 0.06
"""Relative: they run the model in bfloat16, and their own tests allow as much."""

PARIS = "The capital of France is"
CANDLE_MI = dict(
    [
        *((10492, 44.0724), (8920, 16.8729), (6887, 8.5976), (5542, 6.8104), (6085, 6.2581)),
        *((6735, 5.7137), (14856, 3.5655), (11517, 3.3660), (10034, 3.1190), (688, 2.0420)),
    ]
)
CANDLE_MI_ACTIVE = 14
CANDLE_MI_MSE = 6.91266
CANDLE_MI_NORMS = (61.8125, 59.7459)
CANDLE_MI_RESIDUAL = (
    *(-0.467738, 0.018951, -0.466550, -0.070825, -0.143891),
    *(0.101481, -0.324585, -2.141545, -1.441127, 0.143555),
)

PROSE = (
    "The harbour town lies at the mouth of a slow river. In 1874 its council built a stone bridge,"
    " and two years later the railway arrived, so that fish caught at night could be sold in the"
    " capital by noon. On Saturdays farmers bring apples, cheese and honey to the square, while"
    " children play near the fountain and their parents talk about prices and the next election."
)


@dataclass(frozen=True)
class Features:
    """Of one text. `tokens` [n] as text; `residual` [n, d_model], `activation` [n, width]."""

    tokens: list[str]
    residual: Tensor
    activation: Tensor


def features_of(model: Oracle, sae: SAE, text: str) -> Features:
    assert sae.info.layer is not None
    ids = model.tokenizer.encode(text)
    residual = model.residuals(ids)[sae.info.layer]
    return Features([model.tokenizer.decode([i]) for i in ids], residual, sae.encode(residual))


def check_values(
    found: Features, feature: int, expected: dict[str, float], relative: float
) -> None:
    """The tokens have these values, and the first of them the largest of all but the first token,
    which is BOS or a sink."""
    values = found.activation[1:, feature]
    assert found.tokens[1 + int(values.argmax())] == next(iter(expected))
    for token, value in expected.items():
        assert float(values[found.tokens[1:].index(token)]) == pytest.approx(value, rel=relative)


def check_silent_elsewhere(found: Features, feature: int, expected: dict[str, float]) -> None:
    values = dict(zip(found.tokens[1:], found.activation[1:, feature].tolist(), strict=True))
    assert {token for token, value in values.items() if value != 0.0} == set(expected)


def check_last_token(
    found: Features, sae: SAE, top: dict[int, float], active: int, norms: Sequence[float]
) -> None:
    """Its largest features, their number, and the norms of its residual and reconstruction."""
    last = found.activation[-1]
    values, indices = last.topk(len(top))
    assert indices.tolist() == list(top)
    assert values.tolist() == pytest.approx(list(top.values()), rel=2e-3)
    assert int((last > 0).sum()) == active
    decoded = sae.decode(found.activation)[-1]
    assert [float(found.residual[-1].norm()), float(decoded.norm())] == pytest.approx(
        norms, rel=2e-3
    )


def check_sanity(
    found: Features,
    sae: SAE,
    *,
    l0: tuple[float, float],
    fvu: tuple[float, float],
    norm: tuple[float, float],
    unit: float,
) -> None:
    """Ranges over all but the first token: mean L0, FVU, the median norm of residuals (some tokens
    are sinks); and decoder rows whose norm is 1 to within `unit`."""
    rows = found.residual[1:]
    assert l0[0] < sae.l0(rows) < l0[1]
    assert fvu[0] < sae.fvu(rows) < fvu[1]
    assert norm[0] < float(rows.norm(dim=1).median()) < norm[1]
    assert float((sae.W_dec.float().norm(dim=1) - 1).abs().max()) < unit


def cached(repository: str, *files: str) -> list[Path]:
    """Where files of the hub lie on this machine; skips the test if one is not there."""
    found = [try_to_load_from_cache(repository, file) for file in files]
    missing = [f for f, path in zip(files, found, strict=True) if not isinstance(path, str)]
    if missing:
        pytest.skip(f"{repository} is not in the Hugging Face cache (no {missing[0]})")
    return [Path(str(path)) for path in found]


@pytest.fixture(scope="module")
def gemma() -> Oracle:
    needed = ("config.json", "tokenizer.json", "model.safetensors.index.json")
    folder, _, index = cached(GEMMA, *needed)
    cached(GEMMA, *set(json.loads(index.read_text())["weight_map"].values()))
    return Oracle(str(folder.parent), [0, 20])


@pytest.fixture(scope="module")
def gemma_sae() -> SAE:
    return load_sae(str(cached(SCOPE, LAYER_20)[0]))


@pytest.fixture(scope="module")
def first_sae() -> SAE:
    return load_sae(str(cached(SCOPE, LAYER_0)[0]))


def test_neuronpedias_dogs(gemma_sae: SAE, gemma: Oracle) -> None:
    text, values = ABOUT
    found = features_of(gemma, gemma_sae, text)
    assert found.tokens[0] == "<bos>"
    check_values(found, DOGS, values, NEURONPEDIA_ERROR)
    check_silent_elsewhere(found, DOGS, values)


def test_neuronpedias_dog_on_the_couch(gemma_sae: SAE, gemma: Oracle) -> None:
    text, values = COUCH
    check_values(features_of(gemma, gemma_sae, text), DOGS, values, NEURONPEDIA_ERROR)


def test_candle_mis_table(first_sae: SAE, gemma: Oracle) -> None:
    found = features_of(gemma, first_sae, PARIS)
    assert len(found.tokens) == 6
    check_last_token(found, first_sae, CANDLE_MI, CANDLE_MI_ACTIVE, CANDLE_MI_NORMS)
    assert found.residual[-1, :10].tolist() == pytest.approx(CANDLE_MI_RESIDUAL, rel=2e-3, abs=1e-3)
    error = found.residual - first_sae.decode(found.activation)
    assert float(error.pow(2).mean()) == pytest.approx(CANDLE_MI_MSE, rel=5e-3)


def test_gemma_scope_is_within_the_published_ranges(gemma_sae: SAE, gemma: Oracle) -> None:
    found = features_of(gemma, gemma_sae, PROSE)
    check_sanity(found, gemma_sae, l0=(35, 140), fvu=(0.1, 0.45), norm=(200, 600), unit=1e-4)
    assert 4.5 < float(gemma_sae.threshold.median()) < 30


@pytest.fixture(scope="module")
def demo() -> tuple[Oracle, SAE]:
    return Oracle(str(demo_model()), [20]), load_sae(str(demo_sae()))


def test_the_same_on_the_demo(demo: tuple[Oracle, SAE]) -> None:
    """Its feature 6091 is labelled “cause”, “causes”. Values of others, or other tokens, fail."""
    found = features_of(*demo, "The fire was caused by a storm.")
    check_values(found, 6091, {" caused": 40.7}, NEURONPEDIA_ERROR)
    check_silent_elsewhere(found, 6091, {" caused": 40.7})
    for feature, values in [(6091, {" caused": 36.0}), (6091, {" fire": 40.7}), (151, {" by": 1})]:
        with pytest.raises(AssertionError):
            check_values(found, feature, values, NEURONPEDIA_ERROR)


def test_the_same_table_of_the_demo_by_saelens(demo: tuple[Oracle, SAE]) -> None:
    model, sae = demo
    found = features_of(model, sae, PARIS)
    hf = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    reference = sae_lens.SAE.load_from_disk(demo_sae(), dtype="float32")
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer.encode(PARIS)])
        residual = hf(ids, output_hidden_states=True).hidden_states[21][0]
        activation = reference.encode(residual)
        decoded = reference.decode(activation)
    values, indices = activation[-1].topk(10)
    top = dict(zip(indices.tolist(), values.tolist(), strict=True))
    norms = [float(residual[-1].norm()), float(decoded[-1].norm())]
    check_last_token(found, sae, top, int((activation[-1] > 0).sum()), norms)
    with pytest.raises(AssertionError):
        check_last_token(found, sae, {**top, int(indices[9]): 1.0}, len(top), norms)


def test_the_same_ranges_of_the_demo(demo: tuple[Oracle, SAE]) -> None:
    model, sae = demo
    found = features_of(model, sae, PROSE)
    for read_as, fits in ((sae, nullcontext()), (sae.reading_rms(), pytest.raises(AssertionError))):
        with fits:
            # Its rows are in bfloat16, so not quite of unit norm.
            check_sanity(found, read_as, l0=(30, 110), fvu=(0.1, 0.45), norm=(150, 350), unit=2e-3)
