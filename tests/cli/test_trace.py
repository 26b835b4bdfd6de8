"""`neuroscope trace` on a tiny Llama and two SAEs: what it finds, keeps, draws and refuses."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import DATA_VARIABLE
from neuroscope_vllm.core.calibration import SINK_MULTIPLE
from neuroscope_vllm.core.corpus import Corpus, samples
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.token_labels import readable
from neuroscope_vllm.core.unembedding import read_unembedding
from tests.cli.conftest import SINK_NORM
from tests.support import models
from tests.support.browser import needs_browser, opened
from tests.support.saes import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")
LOWER, UPPER, WIDTH = 3, 20, 96
SAMPLES, MAX_TOKENS = 70, 32
HOSTILE = "</script><script>window.owned = 1</script> $x^{ \\frac <b>bold</b> ⴰ"


@pytest.fixture(scope="module", autouse=True)
def _own_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATA_VARIABLE, str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def lower_sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lower") / "layer_3"
    models.write_saelens_sae(folder, d_model=64, width=WIDTH, layer=LOWER, scale=0.5, seed=3)
    labels = (Label(index, f"{HOSTILE} {index}", "someone", score=0.1) for index in range(WIDTH))
    LabelSet("someone", labels).save(folder / "labels" / "someone.jsonl")
    return folder


@pytest.fixture(scope="module")
def both(lower_sae: Path, labelled_sae: Path) -> tuple[object, ...]:
    return ("--sae", lower_sae, "--sae", labelled_sae)


@pytest.fixture(scope="module")
def watched(tiny_llama: Path, both: tuple[object, ...], collected_corpus: Path) -> dict[str, Any]:
    """The strongest edges once both layers were watched; what fired is kept."""
    return graph(
        tiny_llama, *both, "--backend", "transformers", "--corpus", collected_corpus,
        "--samples", SAMPLES, "--max-tokens", MAX_TOKENS, "--top", 40,
    )  # fmt: skip


def trace(*words: object) -> Result:
    return CliRunner().invoke(main, ["trace", *map(str, words)])


def graph(*words: object) -> dict[str, Any]:
    done = trace(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def ends(found: dict[str, Any]) -> list[tuple[int, int]]:
    return [
        (int(e["source"].split(":")[1]), int(e["target"].split(":")[1])) for e in found["edges"]
    ]


def by_size(values: Tensor, k: int) -> list[tuple[int, int]]:
    flat = values.abs().flatten().topk(k).indices
    return [(int(cell) // values.shape[1], int(cell) % values.shape[1]) for cell in flat]


def test_edges_of_weights_alone(
    lower_sae: Path, labelled_sae: Path, both: tuple[object, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    weight = load_sae(lower_sae).W_dec @ load_sae(labelled_sae).W_enc
    found = graph(*both, "--top", 25)
    assert ends(found) == by_size(weight, 25)
    assert found["schema"] == "neuroscope-causal-graph/1"
    assert (found["by"], found["observation"]) == ("weight", None)
    assert [sae["layer"] for sae in found["saes"]] == [LOWER, UPPER]
    assert found["edges"] == graph("--sae", labelled_sae, "--sae", lower_sae, "--top", 25)["edges"]
    for edge, (i, j) in zip(found["edges"], ends(found), strict=True):
        assert edge["weight"] == pytest.approx(float(weight[i, j]), abs=1e-5)
        assert edge["era"] is None
    nodes = {node["id"]: node for node in found["nodes"]}
    assert set(nodes) == {e[end] for e in found["edges"] for end in ("source", "target")}
    assert nodes[found["edges"][0]["source"]]["unreliable"]
    fed = graph(*both, "--feature", "20:6", "--feature", "3:5", "--top", 4)
    assert ends(fed) == [
        *((int(i), 6) for i in weight[:, 6].abs().topk(4).indices),
        *((5, int(j)) for j in weight[5].abs().topk(4).indices),
    ]
    assert next(n for n in fed["nodes"] if n["id"] == "20:6")["label"] == "meaning 6"
    shown = trace(*both, "--max-cosine", "0.2")
    assert "From weights alone" in shown.output
    assert "cosine above 0.2 are left out" in shown.output
    cosines = [e["cosine"] for e in graph(*both, "--max-cosine", "0.2")["edges"]]
    assert max(cosines) <= 0.2


def activations(model: Path, lower: Path, upper: Path, corpus: Path) -> tuple[Tensor, Tensor, int]:
    """What both SAEs do on the tokens that count, [n, width] each, and how many do not, by
    transformers' own hidden states."""
    hf = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = Corpus(source=str(corpus), samples=SAMPLES, max_tokens=MAX_TOKENS)
    rows, ids, first = [], [], 0
    for at, sequence in enumerate(samples(texts, tokenizer)):
        with torch.no_grad():
            states = hf(torch.tensor([sequence]), output_hidden_states=True).hidden_states
        rows.append([states[layer + 1][0] for layer in (LOWER, UPPER)])
        ids += sequence
        first += len(sequence) if at < 50 else 0
    one, other = (torch.cat(states) for states in zip(*rows, strict=True))
    kept = ~torch.isin(torch.tensor(ids), torch.tensor(tokenizer.all_special_ids))
    # Of the layer that has no calibration, the first chunk tells what a sink is.
    cut = SINK_MULTIPLE * float(one[:first][kept[:first]].norm(dim=1).median())
    kept &= (one.norm(dim=1) <= cut) & (other.norm(dim=1) <= SINK_NORM)
    return (
        load_sae(lower).encode(one[kept]),
        load_sae(upper).encode(other[kept]),
        int((~kept).sum()),
    )


def test_era_and_twera_are_those_of_the_activations(
    watched: dict[str, Any], tiny_llama: Path, lower_sae: Path, labelled_sae: Path,
    both: tuple[object, ...], collected_corpus: Path,
) -> None:  # fmt: skip
    a, b, left_out = activations(tiny_llama, lower_sae, labelled_sae, collected_corpus)
    a, b = a.double(), b.double()
    assert left_out > 0
    assert watched["observation"]["left_out"] == left_out
    assert watched["observation"]["tokens"] == len(a)
    weight = (load_sae(lower_sae).W_dec @ load_sae(labelled_sae).W_enc).double()
    era = (a.T @ (b > 0).double()) / len(a) * weight
    mean = b.mean(0)
    twera = (a.T @ b) / len(a) / torch.where(mean > 0, mean, 1.0) * weight
    assert (twera != 0).sum() > 1000
    assert watched["by"] == "twera"  # where it is known
    # Kept: no model is asked again.
    for by, values in (("twera", twera), ("era", era), ("weight", weight)):
        found = graph(*both, "--by", by, "--top", 40)
        assert set(ends(found)) == set(by_size(values, 40))
        for edge, (i, j) in zip(found["edges"], ends(found), strict=True):
            assert edge["era"] == pytest.approx(float(era[i, j]), rel=1e-4, abs=1e-7)
            assert edge["twera"] == pytest.approx(float(twera[i, j]), rel=1e-4, abs=1e-7)
            assert edge["together"] == int(((a[:, i] > 0) & (b[:, j] > 0)).sum())
    for node in watched["nodes"]:
        fired = (a if node["layer"] == LOWER else b)[:, node["index"]]
        assert node["frequency"] == pytest.approx(float((fired > 0).double().mean()))
        assert node["mean_activation"] == pytest.approx(float(fired.mean()), rel=1e-4)


@pytest.mark.usefixtures("watched")
def test_a_table_says_where_it_is_from(both: tuple[object, ...], tiny_llama: Path) -> None:
    shown = trace(tiny_llama, *both, "--top", 5)
    assert shown.exit_code == 0
    assert "era and twera from" in " ".join(shown.output.split())
    assert "promotes" in shown.output
    assert "<b>bold</b>" in " ".join(shown.output.split())


def test_nodes_tell_the_tokens_they_promote(
    tiny_llama: Path, lower_sae: Path, labelled_sae: Path, both: tuple[object, ...]
) -> None:
    saes = {LOWER: load_sae(lower_sae), UPPER: load_sae(labelled_sae)}
    found = graph(tiny_llama, *both, "--top", 400)
    assert found["model"] == str(tiny_llama)
    weight, gain, tokenizer = read_unembedding(tiny_llama)
    seen = {"promotes": 0, "suppresses": 0}
    for node in found["nodes"]:
        sae = saes[node["layer"]]
        logits = weight @ (sae.W_dec[node["index"]] * gain)
        for name, best in (("promotes", logits.argmax()), ("suppresses", logits.argmin())):
            text = readable(tokenizer.decode([int(best)]))
            assert node[name][:1] in ([], [text]) or not text
            seen[name] += bool(node[name])
    assert min(seen.values()) > 0


@pytest.mark.usefixtures("watched")
def test_pictures_need_no_network_and_take_any_label(
    both: tuple[object, ...], tmp_path: Path
) -> None:
    for ending in ("json", "html", "png", "svg"):
        done = trace(*both, "--output", tmp_path / f"map.{ending}")
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "map.json").read_text()) == graph(*both)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture_of(tmp_path / "map.png").std() > 5  # it is not blank
    svg = (tmp_path / "map.svg").read_text()
    found = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert "path" in found
    assert {"script", "image", "foreignObject", "a"}.isdisjoint(found)
    html = (tmp_path / "map.html").read_text()
    assert "default-src 'none'; script-src 'sha256-" in html
    assert html.count("<script") == 2
    assert "<b>" not in html
    first = (tmp_path / "map.svg").read_bytes()
    trace(*both, "--output", tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_bytes() == first


def picture_of(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return imread(path)[..., :3] * 255


@needs_browser
@pytest.mark.usefixtures("watched")
def test_the_page_draws_edges_and_singles_out_a_feature(
    both: tuple[object, ...], tmp_path: Path
) -> None:
    assert trace(*both, "--top", 30, "--output", tmp_path / "map.html").exit_code == 0
    found = graph(*both, "--top", 30)
    with opened(tmp_path / "map.html", tmp_path / "profile") as page:
        assert page.run("window.owned") is None
        assert page.run("document.querySelectorAll('svg path').length") == 30
        assert page.run("document.querySelectorAll('.node').length") == len(found["nodes"])
        assert page.run("document.querySelectorAll('#edges tr').length") == 31
        target = found["edges"][0]["target"]
        own = sum(edge["target"] == target for edge in found["edges"])
        page.run(
            "{ const node = [...document.querySelectorAll('.node')]"
            f".find((n) => n.firstChild.data.startsWith('{target}')); node.focus() }}"
        )
        page.press("Enter")
        assert page.run("document.querySelectorAll('path.on').length") == own
        assert page.run("document.getElementById('about-node').textContent").startswith(target)
        assert page.run("document.querySelectorAll('b').length") == 0
        assert all(url.startswith("file:") for url in page.requests)
        assert page.faults == []


@pytest.mark.usefixtures("watched")
def test_ablations_are_correlated_with_every_weighting(
    tiny_llama: Path, both: tuple[object, ...], collected_corpus: Path
) -> None:
    words = (
        tiny_llama, *both, "--check-ablations", collected_corpus, "--samples", 6,
        "--max-tokens", MAX_TOKENS, "--ablations", 6,
    )  # fmt: skip
    found = graph(*words)
    assert len(found["ablated"]) == 6
    rows = {(r["pairs_of"], r["effect"], r["weighting"]): r for r in found["rows"]}
    assert len(rows) == 2 * 2 * 5
    assert rows["all", "activation", "twera"]["pairs"] == 6 * found["features"]
    assert rows["together", "activation", "twera"]["pairs"] < 6 * found["features"]
    # The weights of a random model decide little but something of what the layers do.
    assert rows["all", "preactivation", "weight"]["within"] > 0.05
    shown = trace(*words)
    assert "Spearman's rank correlation" in shown.output
    assert found["rows"] == graph(*words)["rows"]


def refused(*words: object) -> str:
    done = trace(*words)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2), done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def test_what_can_not_be_used_is_refused_in_a_sentence(
    lower_sae: Path, labelled_sae: Path, both: tuple[object, ...], tiny_llama: Path,
    collected_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    lower, upper = ("--sae", lower_sae), ("--sae", labelled_sae)
    wide = models.write_saelens_sae(tmp_path / "wide", d_model=32, width=16, layer=5)
    normalised = tmp_path / "normalised"
    shutil.copytree(lower_sae, normalised)
    edit_json(normalised / "cfg.json", normalize_activations="layer_norm")
    assert "give --sae twice" in refused(*lower)
    assert "0 SAEs are given" in refused()
    assert "two SAEs read layer 3" in refused(*lower, *lower)
    assert "of 32; choose two of the same model" in refused(*lower, "--sae", wide)
    assert "divided by the row's own size" in refused("--sae", normalised, *upper)
    suite = ("--sae", "gemma-scope") * 2
    assert "needs a MODEL" in refused(*suite, "--layer", 3, "--layer", 4)
    assert "does not exist" in refused(*lower, "--sae", tmp_path / "none")
    assert "features 0 to 95" in refused(*both, "--feature", "3:96")
    assert "read layers 3 and 20" in refused(*both, "--feature", "4:0")
    assert "is not LAYER:INDEX" in refused(*both, "--feature", "20")
    assert "is not LAYER:INDEX" in refused(*both, "--feature", "20:-1")
    assert "with a MODEL and --corpus" in refused(*both, "--by", "twera")
    assert "ends with none of" in refused(*both, "--output", tmp_path / "map.pdf")
    (tmp_path / "map.png").mkdir()
    assert "is a folder" in refused(*both, "--output", tmp_path / "map.png")
    assert "does not exist" in refused(tiny_llama, *both, "--corpus", "./none.txt")
    checking = (*both, "--check-ablations", collected_corpus)
    assert "leave --output out" in refused(*checking, "--output", tmp_path / "a.html")
    assert "leave --feature out" in refused(*checking, "--feature", "3:1")
    wrong = models.write_tiny_model(tmp_path / "narrow", "llama", d_model=32, layers=22)
    assert "residuals of size" in refused(wrong, *checking)
    assert "32 wide" in refused(wrong, *both)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "neuroscope-vllm[plots]" in refused(*both, "--output", tmp_path / "map.svg")
