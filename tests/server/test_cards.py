"""GET /v1/features/{index}: what the card says is what the files say, read by other code."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from neuroscope_vllm.cli.bench_shapes import write_random_sae
from neuroscope_vllm.core import launch, wire
from neuroscope_vllm.core.artefacts import DATA_VARIABLE, find_calibration, home
from neuroscope_vllm.core.sae import read_sae_info
from neuroscope_vllm.engine.fake import FakeEngine
from tests.server.side import Side, start_side
from tests.support import models
from tests.support.collecting import write_corpus
from tests.support.served import bin_path, environment

LAYER, WIDTH = 20, 256


class Known(NamedTuple):
    """An SAE with a calibration and examples of its own."""

    model: Path
    sae: Path
    data: Path
    weights: dict[str, Any]
    calibration: dict[str, Any]


class Engine(FakeEngine):
    """Says of its layers that they are read by SAEs that exist."""

    def __init__(self, endpoint: str, sites: list[wire.Site]) -> None:
        self._sites = sites
        super().__init__(endpoint, layers=[site.layer for site in sites])

    def _hello(self, role: str, counters: dict[str, int]) -> wire.Hello:
        hello = super()._hello(role, counters)
        return msgspec.structs.replace(hello, sites=self._sites if hello.sites else [])


@pytest.fixture(scope="module")
def known(tiny_gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    folder = tmp_path_factory.mktemp("cards")
    sae = models.write_saelens_sae(folder / "sae", d_model=64, width=WIDTH, layer=LAYER)
    corpus = write_corpus(folder / "corpus.jsonl")
    words = [tiny_gemma2, "--backend", "transformers", "--sae", sae, "--corpus", corpus]
    words += ["--samples", 100, "--max-tokens", 48]
    found = {DATA_VARIABLE: str(folder / "data")}
    for command in ("calibrate", "collect"):
        subprocess.run(
            [bin_path("neuroscope"), command, *map(str, words)],
            env=environment(found),
            capture_output=True,
            check=True,
        )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(DATA_VARIABLE, found[DATA_VARIABLE])
        made = find_calibration(str(sae))
        assert made is not None
        weights, calibration = load_file(sae / "sae_weights.safetensors"), load_file(made)
        with safe_open(made, "np") as file:
            header = json.loads(file.metadata()["neuroscope_calibration"])
        yield Known(tiny_gemma2, sae, folder / "data", weights, calibration | header)


@pytest.fixture(scope="module")
def side(known: Known, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    directory = tmp_path_factory.mktemp("side")
    labels = directory / "labels.jsonl"
    given = [
        {"index": i, "text": f"label {i}", "labeller": "t", "score": 0.1 * (i % 10)}
        for i in range(0, WIDTH, 2)
    ]
    labels.write_text("".join(json.dumps(label) + "\n" for label in given))
    bare = write_random_sae(directory / "layer_5/width_16k/average_l0_71", 64, 64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(launch.RUNTIME_VARIABLE, "")
        side = start_side(directory, labels={LAYER: [str(labels)]}, model_source=str(known.model))
    sites = [
        wire.Site(LAYER, read_sae_info(str(known.sae)), "zscore", 8, None, calibration=str(
            find_calibration(str(known.sae)))),
        wire.Site(5, msgspec.structs.replace(read_sae_info(str(bare)), neuronpedia_id="m/5-x"),
                  "activation", 8, None),
    ]  # fmt: skip
    with Engine(side.endpoint, sites):
        side.wait_armed()
        yield side
    side.process.stop()


def card(side: Side, index: int, **params: Any) -> dict[str, Any]:
    answer = side.get(f"/v1/features/{index}", params={"layer": LAYER, **params}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_its_figures_are_the_calibrations(side: Side, known: Known) -> None:
    firings = known.calibration["firings"]
    for index in (int(firings.argmax()), int(firings.argmin()), 17):
        found = card(side, index)
        assert (found["layer"], found["index"], found["width"]) == (LAYER, index, WIDTH)
        assert found["tokens"] == known.calibration["tokens"]
        assert found["firings"] == firings[index]
        assert found["density"] == pytest.approx(firings[index] / found["tokens"])
        assert found["dense"] == (found["density"] > 0.1)
        assert found["max"] == known.calibration["maximum"][index]
        if not firings[index]:
            assert (found["mean"], found["histogram"]) == (None, None)
            continue
        assert found["mean"] == pytest.approx(known.calibration["total"][index] / firings[index])
        edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
        assert len(edges) == len(counts) + 1
        assert sum(counts) == firings[index]
        assert edges[-2] <= found["max"] <= edges[-1]
        assert edges == sorted(edges)


def test_its_examples_are_the_collected_ones(side: Side, known: Known) -> None:
    folder = home(str(known.sae)) / "examples"
    rows = pq.read_table(folder / "examples.parquet").to_pylist()
    index = max(range(WIDTH), key=lambda i: sum(row["feature"] == i for row in rows))
    mine = [row for row in rows if row["feature"] == index]
    shown = card(side, index)["examples"]
    top = [row for row in mine if row["kind"] == "top"]
    keys = ("activation", "tokens", "activations", "at")
    assert shown["top"] == [{key: row[key] for key in keys} for row in top[:10]]
    sample = sorted((row["activation"] for row in mine if row["kind"] == "sample"), reverse=True)
    parts = shown["quantiles"]
    assert len(parts) == 4
    assert (parts[0]["to"], parts[-1]["from"]) == (sample[0], sample[-1])
    for one, following in zip(parts, [*parts[1:], None], strict=True):
        values = [example["activation"] for example in one["examples"]]
        assert values == sorted(values, reverse=True)
        assert (values[0], values[-1]) == (one["to"], one["from"])
        assert following is None or one["from"] >= following["to"]


def test_its_tokens_and_neighbours_are_of_the_weights(side: Side, known: Known) -> None:
    index = 18
    found = card(side, index)
    (file,) = known.model.glob("*.safetensors")
    tensors = load_file(file)
    embedding = next(v for k, v in tensors.items() if k.endswith("embed_tokens.weight"))
    gain = 1 + next(v for k, v in tensors.items() if k.endswith("model.norm.weight"))
    w_dec = known.weights["W_dec"]
    logits = embedding.astype(np.float64) @ (w_dec[index] * gain)
    order = np.argsort(logits)
    tokenizer = AutoTokenizer.from_pretrained(known.model)
    for field, ids in (("promoted", order[::-1][:10]), ("suppressed", order[:10])):
        assert [one["token_id"] for one in found[field]] == ids.tolist()
        assert [one["token"] for one in found[field]] == [tokenizer.decode([i]) for i in ids]
        assert [one["logit"] for one in found[field]] == pytest.approx(logits[ids], abs=1e-4)
    unit = w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)
    cosine = unit @ unit[index]
    near = [int(i) for i in np.argsort(-cosine) if i != index][:10]
    assert [one["index"] for one in found["neighbours"]] == near
    for one in found["neighbours"]:
        assert one["cosine"] == pytest.approx(cosine[one["index"]], abs=1e-5)
        labelled = one["index"] % 2 == 0
        assert one["label"] == (f"label {one['index']}" if labelled else None)
        assert one["unreliable"] == (labelled and one["index"] % 10 < 6)


def test_labels_come_with_where_they_are_from(side: Side) -> None:
    found = card(side, 4)
    assert found["label"] == found["labels"][0]
    assert (found["label"]["text"], found["label"]["score"]) == ("label 4", 0.4)
    assert found["label"]["unreliable"] is True
    assert (card(side, 5)["label"], card(side, 5)["labels"]) == (None, [])


def test_what_is_not_known_is_said(side: Side) -> None:
    found = card(side, 3, layer=5)
    assert found["neuronpedia"] == "https://www.neuronpedia.org/m/5-x/3"
    for field in ("density", "histogram", "examples"):
        assert found[field] is None
    assert "neuroscope calibrate" in found["missing"]["density"]
    assert "neuroscope collect" in found["missing"]["examples"]
    assert found["promoted"]
    quick = card(side, 3, layer=5, weights=False)
    assert (quick["promoted"], quick["suppressed"], quick["neighbours"]) == (None, None, None)


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("256?layer=20", 404, "feature 256 does not exist; there are 0 to 255"),
        ("-1?layer=20", 404, "0 to 255"),
        ("1?layer=7", 404, "layer 7 is not observed here; 5, 20 is"),
        ("1", 400, "say which layer"),
        ("x?layer=20", 400, "index"),
    ],
)
def test_there_is_no_such_card(side: Side, path: str, status: int, said: str) -> None:
    answer = side.get(f"/v1/features/{path}")
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


def test_a_reader_that_was_killed_comes_back(side: Side) -> None:
    card(side, 1)
    assert side.process.pid is not None
    (reader,) = _children(side.process.pid)
    reader.kill()
    reader.wait(10)
    assert card(side, 1)["index"] == 1


def _children(pid: int) -> list[Any]:
    import psutil

    return [
        one
        for one in psutil.Process(pid).children()
        if "neuroscope_vllm.core.cards" in one.cmdline()
    ]
