"""The embedded demo: what ships of it, and what its flags choose."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import sae_lens
import torch
import yaml
from safetensors import safe_open

from neuroscope_vllm.cli.demo import demo_sae
from neuroscope_vllm.core.artefacts import find_calibration
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.examples import ExampleStore, find_examples
from neuroscope_vllm.core.guide import check_presets, load_guide
from neuroscope_vllm.core.labels import RELIABLE_SCORE, stored_labels
from neuroscope_vllm.core.sae import load_sae
from tests.cli.test_cli import config_of, run

LAYERS = (10, 20, 28)
FOLDER = demo_sae().parent
LIMIT = 40_000_000  # bytes


def chosen(*words: str, **environ: str) -> dict:
    code, out, error = run("demo", *words, "--print-command", **environ)
    assert code == 0, error
    return config_of(out.splitlines()[-1])["neuroscope"]


def test_it_observes_layer_20_with_its_preset_and_guide() -> None:
    assert chosen() == {
        "sae": [str(FOLDER / "layer_20")],
        "steering": str(FOLDER / "steering.yaml"),
        "guide": str(FOLDER / "guide.yaml"),
    }


def test_it_has_saes_of_other_layers(tmp_path: Path) -> None:
    found = chosen("--layers", "10,20,28")
    assert found["sae"] == [str(FOLDER / f"layer_{layer}") for layer in LAYERS]
    assert found["layer"] == list(LAYERS)
    assert ("steering" in found, "guide" in found) == (True, False)
    assert chosen("--layer", "10") == {"sae": [str(FOLDER / "layer_10")], "layer": [10]}
    file = tmp_path / "settings.yaml"
    file.write_text("layer: [10, 28]\n")
    for found in (chosen("--config", str(file)), chosen(NEUROSCOPE_LAYER="10,28")):
        assert found["sae"] == [str(FOLDER / f"layer_{layer}") for layer in (10, 28)]
    for words in (("--layers", "20,12"), ("--layers", "10,20,12,28")):
        code, _, error = run("demo", *words, "--print-command")
        assert (code, "the demo has SAEs of layers 10, 20, 28, not of 12" in error) == (2, True)


def test_what_the_operator_gives_is_taken_in_place_of_its_own(tmp_path: Path) -> None:
    found = chosen("--steering", "mine.yaml")
    assert (found["steering"], "guide" in found) == ("mine.yaml", False)
    found = chosen(NEUROSCOPE_GUIDE="mine.yaml")
    assert (found["guide"], "steering" in found) == ("mine.yaml", False)
    file = tmp_path / "settings.yaml"
    file.write_text("sae: mine\n")
    for found in (
        chosen("--sae", "mine"),
        chosen(NEUROSCOPE_SAE="mine"),
        chosen("--config", str(file)),
    ):
        assert found == {"sae": ["mine"]}
    assert "steering" not in chosen("--sae-input", "rms")


def test_everything_that_ships_is_small_and_names_no_machine() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    told = [
        path.read_text() for path in files if path.suffix in (".json", ".jsonl", ".yaml", ".md")
    ]
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                told.append(str(tensors.metadata()))
        elif path.suffix == ".parquet":
            told.append(str(pq.read_schema(path).metadata))
    assert len(told) == len(files)
    for text in told:
        assert not re.search(r"/(home|root|work|var/tmp|Users)/", text)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_ships_of_an_sae_belongs_together(layer: int) -> None:
    folder = demo_sae(layer)
    sae = load_sae(str(folder))
    reference = sae_lens.SAE.load_from_disk(folder, dtype="float32")
    x = torch.randn(8, sae.d_model, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.allclose(sae.encode(x), reference.encode(x), rtol=1e-4, atol=1e-3)

    calibration = Calibration.load(find_calibration(str(folder)))
    assert (calibration.width, calibration.tokens >= 1_000_000) == (sae.width, True)
    store = ExampleStore(find_examples(str(folder)))
    assert (store.collection.width, store.collection.layer) == (sae.width, layer)
    # Of the texts that may ship, and no others.
    assert calibration.corpus.startswith("tokens/shippable.parquet,")
    assert store.collection.corpus.startswith("tokens/shippable.parquet,")
    labelled = {labels.labeller: labels for labels in stored_labels(str(folder)).values()}
    assert len(labelled["tokens"]) > 0.9 * sae.width
    card = (folder / "MODEL_CARD.md").read_text()
    trained = json.loads((folder / "cfg.json").read_text())["metadata"]["training_tokens"]
    for said in (
        f"layer {layer}, {sae.width:,} features",
        f"\n{trained:,} tokens, in one pass",
        "| loss recovered |",
        "https://creativecommons.org/licenses/by-sa/3.0/",
        "## Labels",
    ):
        assert said in card
    twenty = card.split("## Twenty features")[1].splitlines()
    assert sum(bool(re.match(r"\| \d+ \|", line)) for line in twenty) == 20


def test_hand_written_labels_are_scored_and_the_unreliable_stay() -> None:
    labels = {one.labeller: one for one in stored_labels(str(demo_sae())).values()}["manual"]
    scores = [label.score for label in labels]
    assert len(scores) >= 300
    assert None not in scores
    assert min(scores) < RELIABLE_SCORE < max(scores)


def test_the_few_examples_that_ship_are_not_enough_to_label_by() -> None:
    for command in ("label", "score"):
        code, _, error = run(command, "--labeller", "tokens", "--dry-run")
        assert (code, "are a few of each feature, for its card; gather more with" in error) == (
            1,
            True,
        )


def test_the_guide_tells_three_stories_and_asks_for_a_preset_that_there_is() -> None:
    settings = Settings(sae=["s"], **{n: str(FOLDER / f"{n}.yaml") for n in ("steering", "guide")})
    presets = yaml.safe_load((FOLDER / "steering.yaml").read_text())["presets"]
    check_presets(settings, presets)
    suggestions = load_guide(settings)
    assert sum(one.preset is None for one in suggestions) == 3
    assert {one.preset for one in suggestions} - {None} == set(presets)
    assert all(one.look_for and one.max_tokens for one in suggestions)
