"""Labels of an SAE that was trained again or read other texts since, and models that think."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import DATA_VARIABLE, home
from tests.support.llm_server import LLMServer
from tests.support.word_features import WordFeatures

TWO = ("--labeller", "gpt", "--features", "3,4")


@pytest.fixture
def sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An SAE, here only a name, with examples."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "sae").mkdir()
    source = str(tmp_path / "sae")
    WordFeatures().write(home(source) / "examples")
    return source


def answer(system: str, user: str) -> dict[str, Any]:
    """To a labeller a label, to a scorer noughts."""
    if "Example 1:" in user:
        return {"label": "a word"}
    return {"answers": [0] * 5}


def run(*words: str) -> tuple[int, dict[str, Any], str]:
    result = CliRunner().invoke(main, [*words, "--json"])
    found = json.loads(result.stdout) if result.stdout else {}
    return result.exit_code, found, " ".join(result.stderr.split())


def test_after_a_retraining_features_are_labelled_again_and_old_labels_not_scored(sae: str) -> None:
    with LLMServer(answer) as server:
        ask = ("--sae", sae, "--base-url", server.url, *TWO)
        assert run("label", *ask)[1]["labelled"] == 2
        assert run("label", *ask)[1]["already_labelled"] == 2
        WordFeatures().write(home(sae) / "examples", "e" * 16)
        asked = len(server.asked)
        code, _, err = run("score", *ask)
        assert (code, len(server.asked)) == (1, asked)
        assert "2 of these labels were written for other weights" in err
        again = run("label", *ask)[1]
        assert (again["labelled"], again["already_labelled"]) == (2, 0)


def test_labels_from_another_corpus_are_scored_with_a_warning(sae: str) -> None:
    with LLMServer(answer) as server:
        ask = ("--sae", sae, "--base-url", server.url, *TWO)
        run("label", *ask)
        code, _, err = run("score", *ask, "--dry-run")
        assert (code, "another collection" in err) == (0, False)
        WordFeatures(sequences=380).write(home(sae) / "examples")
        code, found, err = run("score", *ask, "--dry-run")
        assert (code, found["to_score"]) == (0, 2)
        assert "2 of these labels were written from another collection" in err
        assert run("label", *ask)[1]["already_labelled"] == 2


def test_a_model_that_thinks_is_given_room_and_its_price_is_reckoned_with(sae: str) -> None:
    with LLMServer(answer) as server:
        ask = ("label", "--sae", sae, "--base-url", server.url, *TWO)
        plain = run(*ask, "--dry-run")[1]["cost_at_most"]
        roomy = run(*ask, "--dry-run", "--thought-tokens", "5000")[1]["cost_at_most"]
        assert roomy > 2 * plain
        assert run(*ask, "--thought-tokens", "5000")[1]["labelled"] == 2
        assert {body["max_tokens"] for body in server.bodies} == {5200}
