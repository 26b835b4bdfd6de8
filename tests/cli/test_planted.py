"""`collect`, `label` and `score` on features whose meaning is known by construction."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import DATA_VARIABLE
from neuroscope_vllm.core.examples import ExampleStore
from tests.support import planted
from tests.support.llm_server import LLMServer
from tests.support.planted import FEATURES, PLACE

SHOWN = re.compile(r"(?:Text|Example) \d+: (.*)")
WORD = re.compile(r"<bos>|[^\s<>]+")
FIRST_FEATURES = ",".join(map(str, range(len(FEATURES))))


def parsed(text: str) -> tuple[list[str], list[bool]]:
    """A text's words, and which of them are marked."""
    words: list[str] = []
    marked: list[bool] = []
    for at, part in enumerate(re.split(r"<<|>>", text)):
        found = WORD.findall(part)
        words += found
        marked += [at % 2 == 1] * len(found)
    return words, marked


def oracle(system: str, user: str) -> dict[str, Any]:
    """Knows which meanings there are, but not which feature it is asked about."""
    texts = [parsed(text) for text in SHOWN.findall(user)]
    if "one field, label" in system:
        return {"label": max(FEATURES, key=lambda label: agreement(label, texts))}
    label = user.removeprefix("Label: ").partition("\n")[0]
    every = "marked tokens" in system
    return {
        f"text_{number}": int(
            fits(label, words, marked) if every else any(planted.means(label, words))
        )
        for number, (words, marked) in enumerate(texts, start=1)
    }


def fits(label: str, words: list[str], marked: list[bool]) -> bool:
    """Whether every marked word is meant."""
    meant = planted.means(label, words)
    return all(is_meant for is_meant, mark in zip(meant, marked, strict=True) if mark)


def agreement(label: str, texts: list[tuple[list[str], list[bool]]]) -> float:
    right = [
        is_meant == mark
        for words, marked in texts
        for is_meant, mark in zip(planted.means(label, words), marked, strict=True)
    ]
    return sum(right) / len(right)


class World(NamedTuple):
    sae: Path
    server: LLMServer
    examples: Path


def run(*words: str) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0, result.stderr or result.exception
    return result.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The features' examples, as the real `collect` finds them."""
    folder = tmp_path_factory.mktemp("planted")
    model, sae = planted.write_model(folder / "model"), planted.write_sae(folder / "layer_0")
    corpus = planted.write_corpus(folder / "corpus.jsonl")
    with pytest.MonkeyPatch.context() as patch, LLMServer(oracle) as server:
        patch.setenv(DATA_VARIABLE, str(folder / "data"))
        # In a process of its own, whose threads sleep while they wait: see `start_engine`.
        words = [sys.executable, "-m", "neuroscope_vllm.cli", "collect", str(model), "--json"]
        words += ["--sae", str(sae), "--backend", "transformers", "--corpus", str(corpus)]
        done = subprocess.run([*words, "--samples", "1000"], stdout=subprocess.PIPE, check=True)
        (found,) = json.loads(done.stdout)
        assert found["samples"] == 360
        yield World(sae, server, Path(found["path"]))


@pytest.fixture
def asks(world: World) -> list[str]:
    return ["--sae", str(world.sae), "--base-url", world.server.url, "--json"]


@pytest.fixture(scope="module")
def labelled(world: World) -> list[str]:
    """What the oracle takes each feature for."""
    words = ("--sae", str(world.sae), "--base-url", world.server.url)
    run("label", *words, "--labeller", "oracle", "--features", FIRST_FEATURES)
    shown = ("labels", "export", "oracle", "--sae", str(world.sae))
    return [json.loads(line)["text"] for line in run(*shown).splitlines()]


def scores(asks: list[str], labeller: str) -> dict[int, dict[str, Any]]:
    found = json.loads(run("score", *asks, "--labeller", labeller))
    assert (found["failed"], found["stopped"]) == ({}, None)
    return {one["index"]: one for one in found["features"]}


def keep(world: World, tmp_path: Path, labeller: str, texts: dict[int, str]) -> None:
    lines = [
        json.dumps({"index": index, "text": text, "labeller": labeller})
        for index, text in texts.items()
    ]
    (tmp_path / "made.jsonl").write_text("\n".join(lines) + "\n")
    run("labels", "import", str(tmp_path / "made.jsonl"), "--sae", str(world.sae))


def test_the_examples_show_what_each_feature_means(world: World) -> None:
    store = ExampleStore(world.examples)
    for index, meaning in enumerate(FEATURES):
        examples = store.of(index)
        assert len(examples) >= 60, meaning
        for example in examples:
            words = [token.strip() for token in example.tokens]
            assert planted.means(meaning, words)[example.at], (meaning, words, example.at)
    firings = {summary.feature: summary.firings for summary in store.features}
    assert firings[FEATURES.index(PLACE)] == 3 * 360


def test_labels_that_are_made_from_them_are_right_and_score_so(
    world: World, asks: list[str], labelled: list[str], tmp_path: Path
) -> None:
    assert labelled == FEATURES
    right = scores(asks, "oracle")
    assert set(right) == set(range(len(FEATURES)))
    for index, one in right.items():
        assert one["score"] >= 0.9, (FEATURES[index], one)
    # The same labels, each at a feature of another kind.
    moved = {i: FEATURES[(i + 3) % len(FEATURES)] for i in range(len(FEATURES))}
    keep(world, tmp_path, "permuted", moved)
    wrong = scores(asks, "permuted")
    for index, one in wrong.items():
        assert one["score"] <= 0.6, (FEATURES[index], moved[index], one)
    compared = json.loads(
        run("labels", "compare", "oracle", "permuted", "--sae", str(world.sae), "--json")
    )
    assert compared["scores"]["score"]["wins_a"] == compared["scores"]["score"]["features"] == 8
    assert compared["wording"]["identical"] == 0
    assert (compared["a"]["unreliable"], compared["b"]["unreliable"]) == (0, 8)


def test_a_label_that_is_too_broad_fails_on_the_hard_negatives(
    world: World, asks: list[str], tmp_path: Path
) -> None:
    even = FEATURES.index("even numbers")
    keep(world, tmp_path, "broad", {even: "numbers"})
    keep(world, tmp_path, "exact", {even: "even numbers"})
    broad, exact = (scores(asks, labeller)[even]["detection"] for labeller in ("broad", "exact"))
    assert exact["balanced"] == 1.0
    assert broad["recall"] == 1.0
    assert broad["false_positives"] >= 10
