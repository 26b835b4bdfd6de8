"""`neuroscope calibrate` against transformers, SAELens and numpy, and against being killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from sae_lens import SAE as LensSAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroscope_vllm.cli.demo import demo_model, demo_sae
from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import DATA_VARIABLE, home, only_writer
from neuroscope_vllm.core.calibration import Calibration, edges
from neuroscope_vllm.engine.calibrate import Checkpoint
from neuroscope_vllm.engine.corpus_run import CHUNK
from tests.core.test_calibration import assert_equal
from tests.support import models
from tests.support.hf_hub import HubServer
from tests.support.served import bin_path, environment

EAGER = ("--", "--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "200")
SAMPLES = 7 * CHUNK
MAX_TOKENS = 24


def neuroscope(
    *words: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [bin_path("neuroscope"), *map(str, words)],
        env=environment(env),
        capture_output=True,
        text=True,
        check=False,
    )


def calibrate(*words: object, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    done = neuroscope("calibrate", *words, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of very different lengths, a third of them too short to be samples."""
    draw = random.Random(0)
    words = " ".join(models.TRAINING_TEXT).split()
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    lines = [
        json.dumps({"text": " ".join(draw.choices(words, k=draw.choice([2, 12, 30])))})
        for _ in range(2 * SAMPLES)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def saes(tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("saes") / "layer_5"
    models.write_saelens_sae(folder, d_model=64, width=256, layer=5, seed=1)
    return {5: folder, 20: tiny_sae}


@pytest.fixture(scope="module")
def calibrated(
    tiny_gemma2: Path, saes: dict[int, Path], corpus: Path, data: dict[str, str]
) -> list[dict[str, Any]]:
    """Two layers at once, by vLLM, where prompts come in chunks."""
    return calibrate(
        tiny_gemma2, "--sae", saes[20], "--sae", saes[5], "--corpus", corpus, "--samples", SAMPLES,
        "--max-tokens", MAX_TOKENS, "--json", *EAGER, env=data,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Other tests' servers must not find what is made here."""
    return {DATA_VARIABLE: str(tmp_path_factory.mktemp("data"))}


def samples_of(path: Path, tokenizer: Any, max_tokens: int, samples: int) -> list[list[int]]:
    """The rule, once more: rows cut to pieces behind a BOS; pieces under 16 tokens left out."""
    bos = tokenizer("")["input_ids"]
    room = max_tokens - len(bos)
    found = []
    for line in path.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        pieces = [ids[at : at + room] for at in range(0, len(ids), room)]
        found += [bos + piece for piece in pieces if len(piece) >= 16]
    return found[:samples]


@torch.no_grad()
def expected(
    model: Path, sae: Path, layer: int, sequences: list[list[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(norm [n], residual [n, d_model], activation [n, width]) of all tokens but special ones."""
    hf = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    special = torch.tensor(AutoTokenizer.from_pretrained(model).all_special_ids)
    torch.set_num_threads(1)  # tiny layers: threads would wait for each other
    rows = []
    for sequence in sequences:
        ids = torch.tensor(sequence)
        states = hf(ids[None], output_hidden_states=True).hidden_states[layer + 1][0]
        rows.append(states[~torch.isin(ids, special)])
    residual = torch.cat(rows)
    activation = LensSAE.load_from_disk(sae, device="cpu").encode(residual)
    return residual.norm(dim=1).numpy(), residual.numpy(), activation.numpy()


def check(calibration: Calibration, norm: Any, residual: Any, activation: Any, sae: Path) -> None:
    """Against numpy, once sinks are left out."""
    kept = norm <= calibration.sink_norm
    residual, activation = residual[kept], activation[kept].astype(np.float64)
    assert (calibration.tokens, calibration.sinks) == (kept.sum(), (~kept).sum())
    firings = (activation > 0).sum(axis=0)
    # A rounding may lift an activation over its threshold, or not.
    assert np.abs(calibration.firings.numpy() - firings).max() <= 2
    np.testing.assert_allclose(calibration.frequency, firings / kept.sum(), atol=1e-3)
    np.testing.assert_allclose(calibration.mean, activation.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(calibration.std, activation.std(axis=0), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(calibration.maximum, activation.max(axis=0), rtol=1e-3, atol=1e-3)
    limits = edges().numpy()
    limits[0], limits[-1] = 0.0, np.inf
    limits = np.delete(limits, -2)
    counted = np.histogram(activation[activation > 0], limits)[0]
    difference = np.abs(calibration.histogram.sum(dim=0).numpy() - counted).sum()
    assert difference <= 1e-3 * counted.sum()
    decoded = LensSAE.load_from_disk(sae, device="cpu").decode(torch.tensor(activation).float())
    error = ((residual - decoded.detach().numpy()) ** 2).sum()
    fvu = error / ((residual - residual.mean(axis=0)) ** 2).sum()
    assert calibration.reconstruction is not None
    assert calibration.reconstruction.fvu == pytest.approx(float(fvu), rel=1e-3)


@pytest.mark.parametrize("layer", [5, 20])
def test_vllm_measures_what_transformers_and_saelens_compute(
    layer: int,
    calibrated: list[dict[str, Any]],
    tiny_gemma2: Path,
    saes: dict[int, Path],
    corpus: Path,
    data: dict[str, str],
) -> None:
    found = next(one for one in calibrated if one["layer"] == layer)
    assert Path(found["path"]).is_relative_to(data[DATA_VARIABLE])
    calibration = Calibration.load(found["path"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma2)
    sequences = samples_of(corpus, tokenizer, MAX_TOKENS, SAMPLES)
    norm, residual, activation = expected(tiny_gemma2, saes[layer], layer, sequences)
    check(calibration, norm, residual, activation, saes[layer])
    assert calibration.median_norm == pytest.approx(float(np.median(norm)), rel=0.02)
    pilot = expected(tiny_gemma2, saes[layer], layer, sequences[:CHUNK])[0]
    assert calibration.sink_norm == pytest.approx(6 * float(np.median(pilot)), rel=0.02)
    assert found["samples"] == SAMPLES
    assert found["tokens"] == calibration.tokens
    assert found["l0"] == calibration.l0
    assert not list(Path(found["path"]).parent.glob("*checkpoint*"))


def test_transformers_measures_the_same(
    calibrated: list[dict[str, Any]],
    tiny_gemma2: Path,
    saes: dict[int, Path],
    corpus: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "c.safetensors"
    (found,) = calibrate(
        tiny_gemma2, "--sae", saes[20], "--corpus", corpus, "--samples", SAMPLES, "--json",
        "--max-tokens", MAX_TOKENS, "--output", output, "--backend", "transformers",
    )  # fmt: skip
    theirs = next(one for one in calibrated if one["layer"] == 20)
    for name in ("tokens", "sinks", "samples", "features"):
        assert found[name] == theirs[name]
    for name in ("l0", "explained_variance", "median_norm", "sink_norm"):
        assert found[name] == pytest.approx(theirs[name], rel=1e-3)


def test_killed_three_times_it_ends_with_the_same_bits(
    calibrated: list[dict[str, Any]], tiny_gemma2: Path, saes: dict[int, Path], corpus: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    output = tmp_path / "killed.safetensors"
    words = (
        "calibrate", tiny_gemma2, "--sae", saes[20], "--corpus", corpus, "--samples", SAMPLES,
        "--max-tokens", MAX_TOKENS, "--output", output, "--json", *EAGER,
    )  # fmt: skip
    checkpoint = tmp_path / "killed.safetensors.checkpoint"
    draw = random.Random(os.environ.get("PYTEST_SEED", 0))
    chunks = [kill(words, checkpoint, draw.uniform(0, 0.15)) for _ in range(3)]
    assert chunks == sorted(chunks)
    assert 0 < chunks[-1] < SAMPLES / CHUNK
    calibrate(*words[1:])
    whole = next(one for one in calibrated if one["layer"] == 20)
    assert_equal(Calibration.load(output), Calibration.load(whole["path"]))


def kill(words: tuple[object, ...], checkpoint: Path, delay: float) -> int:
    """SIGKILL a run `delay` seconds after it wrote a checkpoint; returns the chunks done."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(
        [bin_path("neuroscope"), *map(str, words)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return msgspec.msgpack.decode(checkpoint.read_bytes(), type=Checkpoint).chunks


def test_the_demo_is_the_model_when_none_is_named_and_its_sinks_are_left_out(
    tmp_path: Path,
) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n\n".join(" ".join(models.TRAINING_TEXT).split(". ")))
    words = ("--backend", "transformers", "--corpus", corpus, "--output", tmp_path / "c", "--json")
    (found,) = calibrate(*words, "--samples", 8)
    assert found["sinks"] >= found["samples"]  # SmolLM2's first position at least
    norm, residual, activation = expected(
        demo_model(), demo_sae(), 20, demo_samples(corpus, found["samples"])
    )
    check(Calibration.load(tmp_path / "c"), norm, residual, activation, demo_sae())


def demo_samples(corpus: Path, samples: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    paragraphs = corpus.read_text().split("\n\n")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in paragraphs]
    pieces = [row[at : at + 256] for row in ids for at in range(0, len(row), 256)]
    return [piece for piece in pieces if len(piece) >= 16][:samples]


def run_here(*words: object) -> Result:
    """In this process, where everything heavy is loaded."""
    return CliRunner().invoke(main, ["calibrate", *map(str, words)])


def refused(*words: object) -> str:
    done = run_here(*words)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2), done.output
    return " ".join(done.output.split())


@pytest.fixture
def quick(tiny_gemma2: Path, tiny_sae: Path) -> tuple[object, ...]:
    return (tiny_gemma2, "--sae", tiny_sae, "--backend", "transformers")


def test_a_checkpoint_of_another_run_is_not_taken_for_this_ones(
    quick: tuple[object, ...], corpus: Path, tmp_path: Path
) -> None:
    """Nor what was done with other weights, other text, or another engine."""
    sae, text = tmp_path / "sae", tmp_path / "texts.jsonl"
    shutil.copytree(str(quick[2]), sae)
    lines = corpus.read_text().splitlines()
    text.write_text("\n".join(lines))
    output = tmp_path / "c"
    checkpoint = Path(f"{output}.checkpoint")
    options = ("--output", output, "--max-tokens", MAX_TOKENS, "--corpus", text)
    words = (quick[0], "--sae", sae, *quick[3:], *options)
    assert kill(("calibrate", *words), checkpoint, 0) >= 1
    kept = checkpoint.read_bytes()
    assert "is of another run" in refused(*words, "--samples", 10)
    decoded = msgspec.msgpack.decode(kept, type=Checkpoint)
    decoded.run = decoded.run.replace("transformers", "vllm")
    checkpoint.write_bytes(msgspec.msgpack.encode(decoded))
    assert "is of another run" in refused(*words)
    for other in (lines[5:], lines[:9]):
        checkpoint.write_bytes(kept)
        text.write_text("\n".join(other))
        assert "was begun on other text" in refused(*words)
    text.write_text("\n".join(lines))
    for damaged in (kept[:100], kept.replace(b'"F32"', b'"F99"')):
        checkpoint.write_bytes(damaged)
        assert "can not be read" in refused(*words)
    checkpoint.write_bytes(kept)
    shutil.rmtree(sae)
    models.write_saelens_sae(sae, d_model=64, width=512, layer=20, seed=9)
    assert "was begun with other weights" in refused(*words)
    assert run_here(*words, "--restart", "--samples", 10).exit_code == 0
    assert Calibration.load(output).tokens > 0


def test_what_was_there_is_kept_and_each_input_has_its_own(
    quick: tuple[object, ...], corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    words = (*quick, "--corpus", corpus, "--samples")
    first, again, second = (run_here(*words, samples) for samples in (3, 3, 4))
    assert "tokens are few" in first.output
    assert "kept what was there" not in first.output + again.output
    assert "kept what was there" in second.output
    assert run_here(*words, 3, "--sae-input", "rms").exit_code == 0
    folder = home(str(quick[2]))
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")
    old = next(name for name in names if name.endswith(".old"))
    assert names == ["calibration-rms.safetensors", "calibration.safetensors", old]
    assert Calibration.load(folder / "calibration-rms.safetensors").sae_input == "rms"
    assert (
        Calibration.load(folder / "calibration.safetensors").tokens
        > Calibration.load(folder / old).tokens
    )


def test_what_does_not_fit_is_said(
    quick: tuple[object, ...], saes: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    model = quick[0]
    read = ("--corpus", corpus)
    assert "name the SAE with --sae" in refused(model, *read)
    assert "is no folder" in refused(tmp_path / "none", *quick[1:], *read)
    assert "can not read layer 3" in refused(*quick, "--layer", 3, *read).replace(
        "cannot", "can not"
    )
    two = ("--sae", saes[5], "--output", tmp_path / "c")
    assert "several SAEs; leave it out" in refused(*quick, *two, *read)
    short = tmp_path / "short.txt"
    short.write_text("A heading\n\nAnother")
    assert "gave no sample of at least 16 tokens" in refused(*quick, "--corpus", short)
    assert "is for vLLM" in refused(*quick, *read, "--", "--dtype", "float32")
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    assert "can not be made" in refused(*quick, *read, "--output", blocked / "c")
    with only_writer(tmp_path / "c"):
        busy = refused(*quick, *read, "--output", tmp_path / "c")
    assert "another process is making" in busy
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refused(*quick, *read, "--output", tmp_path / "folder")
    assert "nope.txt does not exist" in refused(*quick, "--corpus", "nope.txt")


WIKITEXT_CARD = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: train
    path: wikitext-103-raw-v1/train-*
---
"""


def test_wikitext_is_the_default_corpus(quick: tuple[object, ...], tmp_path: Path) -> None:
    text = [" = A heading = \n", "", *(f" {line} \n" for line in models.TRAINING_TEXT * 30)]
    pq.write_table(pa.table({"text": text}), tmp_path / "train.parquet")
    files = {
        "README.md": WIKITEXT_CARD.encode(),
        "wikitext-103-raw-v1/train-00000-of-00001.parquet": (
            tmp_path / "train.parquet"
        ).read_bytes(),
    }
    words = (*quick, "--output", tmp_path / "c", "--samples", 4, "--json")
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("Salesforce/wikitext", files=files, repo_type="dataset")
        (found,) = calibrate(*words, env=hub.environ(tmp_path / "home"))
    assert found["samples"] == 4
    assert found["corpus"] == "Salesforce/wikitext train, 4 samples of 256 tokens at most"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "other")}
    refusal = neuroscope("calibrate", *words, env=offline)
    assert refusal.returncode == 1
    assert "corpus Salesforce/wikitext can not be read" in " ".join(refusal.stderr.split())
