"""`neuroscope collect` against transformers, SAELens and numpy, and against being killed."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from sae_lens import SAE as LensSAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroscope_vllm.core.artefacts import DATA_VARIABLE
from neuroscope_vllm.core.examples import ExampleStore, find_examples
from neuroscope_vllm.core.examples.hashes import held_out
from neuroscope_vllm.core.examples.pairs import PARTNERS, STRONGEST
from neuroscope_vllm.engine.corpus_run import CHUNK
from tests.cli.test_calibrate import EAGER, samples_of
from tests.support import models
from tests.support.collecting import (
    AFTER,
    BEFORE,
    MAX_TOKENS,
    SAMPLE,
    SAMPLES,
    TOP,
    WANTED,
    collect,
    refused,
    run_here,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saes(tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("saes") / "layer_5"
    models.write_saelens_sae(folder, d_model=64, width=256, layer=5, seed=1)
    return {5: folder, 20: tiny_sae}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {DATA_VARIABLE: str(tmp_path_factory.mktemp("data"))}


@pytest.fixture(scope="module")
def collected(
    tiny_gemma2: Path, saes: dict[int, Path], collected_corpus: Path, data: dict[str, str]
) -> list[dict[str, Any]]:
    """Two layers at once, by vLLM, where prompts come in chunks."""
    sources = ("--sae", saes[20], "--sae", saes[5])
    return collect(
        tiny_gemma2, *sources, "--corpus", collected_corpus, *WANTED, "--json", *EAGER, env=data
    )


@pytest.fixture(scope="module")
def sequences(tiny_gemma2: Path, collected_corpus: Path) -> list[list[int]]:
    return samples_of(
        collected_corpus, AutoTokenizer.from_pretrained(tiny_gemma2), MAX_TOKENS, SAMPLES
    )


class Truth(NamedTuple):
    """float32 [tokens, width] of each sequence, zero on special tokens; and residual norms."""

    activation: list[NDArray[np.float32]]
    norm: list[NDArray[np.float32]]


@pytest.fixture(scope="module")
def truths(
    tiny_gemma2: Path, saes: dict[int, Path], sequences: list[list[int]]
) -> dict[int, Truth]:
    """By layer, from one pass of transformers."""
    hf = AutoModelForCausalLM.from_pretrained(
        tiny_gemma2, dtype=torch.float32, attn_implementation="eager"
    )
    special = torch.tensor(AutoTokenizer.from_pretrained(tiny_gemma2).all_special_ids)
    lenses = {layer: LensSAE.load_from_disk(sae, device="cpu") for layer, sae in saes.items()}
    found = {layer: Truth([], []) for layer in saes}
    for sequence in sequences:
        ids = torch.tensor(sequence)
        with torch.no_grad():
            states = hf(ids[None], output_hidden_states=True).hidden_states
            for layer, lens in lenses.items():
                activation = lens.encode(states[layer + 1][0])
                activation[torch.isin(ids, special)] = 0
                found[layer].activation.append(activation.numpy())
                found[layer].norm.append(states[layer + 1][0].norm(dim=1).numpy())
    return found


def store_of(collected: list[dict[str, Any]], layer: int) -> ExampleStore:
    return ExampleStore(Path(next(one for one in collected if one["layer"] == layer)["path"]))


def context(sequence: list[int], position: int) -> tuple[int, ...]:
    return tuple(sequence[max(position - BEFORE, 0) : position + 1])


@pytest.mark.parametrize("layer", [5, 20])
def test_the_strongest_are_those_of_transformers_and_saelens(
    layer: int,
    collected: list[dict[str, Any]],
    truths: dict[int, Truth],
    sequences: list[list[int]],
) -> None:
    store, truth = store_of(collected, layer), truths[layer]
    for feature, summary in enumerate(store.features):
        best: dict[tuple[int, ...], float] = {}
        firings = 0
        for sequence, activation in zip(sequences, truth.activation, strict=True):
            for position in np.flatnonzero(activation[:, feature]).tolist():
                key = context(sequence, position)
                best[key] = max(best.get(key, 0.0), float(activation[position, feature]))
                firings += 1
        found = store.of(feature)
        top = [e for e in found if e.kind == "top"]
        expected = sorted(best.values(), reverse=True)[:TOP]
        np.testing.assert_allclose([e.activation for e in top], expected, rtol=1e-3)
        sure = {key for key, value in best.items() if expected and value > expected[-1] * 1.001}
        contexts = [context(sequences[e.sequence], e.position) for e in top]
        assert sure <= set(contexts) <= set(best)
        assert len(set(contexts)) == len(top)
        # A rounding may lift an activation over its threshold, or not.
        assert abs(summary.firings - firings) <= 2 + firings / 500
        sampled = [context(sequences[e.sequence], e.position) for e in found if e.kind == "sample"]
        assert len(set(sampled)) == len(sampled)
        assert abs(len(sampled) - min(SAMPLE, len(best))) <= 2
        assert summary.max_activation == pytest.approx(max(best.values(), default=0), rel=1e-3)
    recur = Counter(map(tuple, sequences))
    assert max(recur.values()) > 2  # else nothing was left out


@pytest.mark.parametrize("layer", [5, 20])
def test_each_example_is_in_its_context(
    layer: int,
    collected: list[dict[str, Any]],
    truths: dict[int, Truth],
    sequences: list[list[int]],
    tiny_gemma2: Path,
) -> None:
    store, truth = store_of(collected, layer), truths[layer]
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma2)
    texts: dict[int, dict[int, str]] = {}
    for feature in range(store.collection.width):
        for example in store.of(feature):
            sequence = sequences[example.sequence]
            first = max(example.position - BEFORE, 0)
            stop = min(example.position + AFTER + 1, len(sequence))
            assert len(example.tokens) == stop - first
            assert example.at == example.position - first
            assert example.activation == example.activations[example.at]
            expected = truth.activation[example.sequence][first:stop, feature]
            np.testing.assert_allclose(example.activations, expected, rtol=1e-3, atol=3e-3)
            assert example.held_out == held_out(np.array(sequence))
            known = texts.setdefault(example.sequence, {})
            for position, text in enumerate(example.tokens, start=first):
                assert known.setdefault(position, text) == text
    whole = [number for number, known in texts.items() if len(known) == len(sequences[number])]
    assert len(whole) > 100
    for number in whole:
        joined = "".join(texts[number][i] for i in range(len(texts[number])))
        decoded = tokenizer.decode(sequences[number])
        rest = decoded.removeprefix(joined)
        # A token with half a character is no text at the end of a sequence.
        assert rest == "" or (rest.endswith("\ufffd") and decoded.startswith(joined))
        assert len(rest) <= 3
    assert any("🦜" in "".join(known.values()) for known in texts.values())
    assert any("<bos>" in known.values() for known in texts.values())


def test_the_sample_is_uniform_over_activations(
    collected: list[dict[str, Any]], truths: dict[int, Truth], sequences: list[list[int]]
) -> None:
    store, truth = store_of(collected, 20), truths[20]
    quantiles: list[float] = []
    for feature in range(store.collection.width):
        first: dict[tuple[int, ...], float] = {}
        for sequence, activation in zip(sequences, truth.activation, strict=True):
            for position in np.flatnonzero(activation[:, feature]).tolist():
                first.setdefault(context(sequence, position), float(activation[position, feature]))
        if len(first) < 4 * SAMPLE:
            continue
        values = np.sort(list(first.values()))
        sampled = [
            first[context(sequences[e.sequence], e.position)]
            for e in store.of(feature)
            if e.kind == "sample"
        ]
        quantiles += (np.searchsorted(values, sampled) / len(values)).tolist()
    assert len(quantiles) > 50 * SAMPLE
    counts = np.histogram(quantiles, bins=10, range=(0, 1))[0]
    expected = len(quantiles) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 28  # chi², nine degrees: one in a thousand


def test_partners_are_those_that_fire_on_the_same_tokens(
    collected: list[dict[str, Any]], truths: dict[int, Truth]
) -> None:
    store, truth = store_of(collected, 20), truths[20]
    total: Counter[tuple[int, int]] = Counter()
    for first in range(0, SAMPLES, CHUNK):
        counts: Counter[tuple[int, int]] = Counter()
        for row in np.concatenate(truth.activation[first : first + CHUNK]):
            strongest = np.argsort(-row)[: min(STRONGEST, int((row > 0).sum()))]
            counts.update(combinations(sorted(strongest.tolist()), 2))
        total.update({pair: n for pair, n in counts.items() if n > 1})
    of: dict[int, dict[int, int]] = {}
    for (low, high), n in total.items():
        of.setdefault(low, {})[high] = of.setdefault(high, {})[low] = n
    differing = 0
    for feature, summary in enumerate(store.features):
        partners = of.get(feature, {})
        expected = sorted(partners.items(), key=lambda one: (-one[1], one[0]))[:PARTNERS]
        differing += expected != list(zip(summary.partners, summary.together, strict=True))
        assert len(summary.partners) == len(expected)
        for partner, n in zip(summary.partners, summary.together, strict=True):
            # Where two activations are equal but for roundings, either is the sixteenth.
            assert abs(n - partners[partner]) <= 2
    assert differing < store.collection.width / 50


def test_contexts_have_all_that_fires_in_them(
    collected: list[dict[str, Any]], truths: dict[int, Truth], sequences: list[list[int]]
) -> None:
    store, truth = store_of(collected, 20), truths[20]
    length = BEFORE + 1 + AFTER
    expected = {
        tuple(sequence[at : at + length])
        for sequence in sequences
        if held_out(np.array(sequence))
        for at in range(0, len(sequence) - length + 1, length)
    }
    stretches = []
    wrong = 0
    for one in store.contexts:
        sequence = sequences[one.sequence]
        assert held_out(np.array(sequence))
        stretches.append(tuple(sequence[one.position : one.position + length]))
        assert len(one.tokens) == length
        largest = truth.activation[one.sequence][one.position : one.position + length].max(axis=0)
        features = np.flatnonzero(largest)
        if len(features) != len(one.features):
            wrong += 1  # a rounding
            continue
        assert one.features == features.tolist()
        np.testing.assert_allclose(one.activations, largest[features], rtol=1e-3, atol=1e-3)
    assert sorted(stretches) == sorted(expected)
    assert wrong <= len(stretches) / 50


def test_what_is_said_of_the_collection(
    collected: list[dict[str, Any]],
    tiny_gemma2: Path,
    saes: dict[int, Path],
    collected_corpus: Path,
    data: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, data[DATA_VARIABLE])
    for layer, sae in saes.items():
        found = next(one for one in collected if one["layer"] == layer)
        assert Path(found["path"]) == find_examples(str(sae))
        store = ExampleStore(Path(found["path"]))
        about = store.collection
        assert (about.layer, about.width) == (layer, len(store.features))
        assert (about.before, about.after, about.top, about.sample) == (BEFORE, AFTER, TOP, SAMPLE)
        assert (about.model, about.sae) == (str(tiny_gemma2), str(sae))
        assert str(collected_corpus) in about.corpus
        assert (about.samples, about.tokens) == (SAMPLES, found["tokens"])
        silent = sum(not summary.firings for summary in store.features)
        assert found["silent_features"] == silent
        assert found["features_with_examples"] == about.width - silent
        assert found["contexts"] == len(store.contexts)
        assert 100 < found["peak_memory_mib"] < 20_000
        assert found["tokens_per_second"] > 0
        rows = pq.read_metadata(Path(found["path"]) / "examples.parquet").num_rows
        assert found["mean_examples"] == pytest.approx(rows / (about.width - silent))
        names = {path.name for path in Path(found["path"]).parent.iterdir()}
        assert names <= {"examples", "examples.lock"}


def test_the_calibration_says_what_a_sink_is(
    tiny_gemma2: Path,
    tiny_sae: Path,
    collected_corpus: Path,
    sequences: list[list[int]],
    truths: dict[int, Truth],
    tmp_path: Path,
) -> None:
    sae, output = tmp_path / "sae", tmp_path / "e"
    shutil.copytree(tiny_sae, sae)
    norm = truths[20].norm
    cut = float(np.quantile(np.concatenate(norm[:20]), 0.7))
    calibration = models.write_calibration(
        sae / "calibration.safetensors", width=512, sink_norm=cut
    )
    words = (
        tiny_gemma2, "--sae", sae, "--backend", "transformers", "--corpus", collected_corpus,
        *WANTED, "--output", output, "--samples", 20,
    )  # fmt: skip
    assert run_here(*words).exit_code == 0
    store = ExampleStore(output)
    assert store.collection.sink_norm == cut
    examples = [example for feature in range(512) for example in store.of(feature)]
    assert max(norm[e.sequence][e.position] for e in examples) <= cut * 1.001
    special = AutoTokenizer.from_pretrained(tiny_gemma2).all_special_ids
    ordinary = [
        ~np.isin(ids, special) & (n <= cut) for ids, n in zip(sequences[:20], norm, strict=False)
    ]
    assert abs(store.collection.tokens - sum(map(np.sum, ordinary))) <= 1
    models.write_calibration(calibration, width=99, sink_norm=cut)
    assert "is of 99 features" in refused(*words)
