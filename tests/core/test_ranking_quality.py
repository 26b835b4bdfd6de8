"""The measures against their definitions, the model's part against transformers, the command."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.ranking import RANKINGS, make_ranker
from neuroscope_vllm.core.ranking_measures import (
    DRAWS,
    Bootstrap,
    LabelFit,
    Shown,
    Tokens,
    information,
    interval,
    kept,
    parse_label,
    unexplained,
)
from neuroscope_vllm.core.ranking_quality import RANDOM, ablate, gather, shown_by, verdict
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.token_labels import compose_label, read
from neuroscope_vllm.engine.hf.ablation import Ablator
from tests.support.models import TRAINING_TEXT, write_calibration

WORDS = ["the", " cat", "\n", " Paris", "of", "!"]


def tokens_of(ids: list[int], documents: int = 1, residual: Tensor | None = None) -> Tokens:
    """Each of `ids` followed by the next, in documents of equal length, with nothing active."""
    n = len(ids)
    length = n // documents
    at = torch.arange(n)
    return Tokens(
        document=at // length,
        position=at % length,
        token_id=torch.tensor(ids),
        next_id=torch.tensor([*ids[1:], ids[0]]),
        residual=torch.zeros(n, 4) if residual is None else residual,
        feature=torch.full((n, 1), -1),
        activation=torch.zeros(n, 1),
    )


def shown(*features: list[int]) -> Shown:
    feature = torch.tensor(features)
    return Shown(feature, (feature >= 0).float())


@pytest.mark.parametrize(
    ("reads", "writes"),
    [(["Paris", " Rome"], ["of", ","]), (["”", "“", ", "], []), ([], ["→"]), (["\n"], ["a"])],
)
def test_a_label_is_read_as_it_was_written(reads: list[str], writes: list[str]) -> None:
    seen = [read([" to ", word, " be"], 1, 1.0) for word in reads]
    text = compose_label([one for one in seen if one], writes)
    trimmed = [{w.replace("\n", "⏎").strip().casefold() for w in side} for side in (reads, writes)]
    assert parse_label(text) == tuple(trimmed)


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("“in” before “order” → “order”", {"in"}),
        ("caus-: “caused”, “causing”", {"caused", "causing"}),
        ("“…circ…” in “encircle”", {"circ"}),
        ("“…”, “….”, “…””", {"…", "….", "…”"}),
        ("years: “1789” → “AD”", set()),
    ],
)
def test_what_tokens_have_in_common_is_no_token(text: str, reads: set[str]) -> None:
    assert parse_label(text)[0] == reads
    assert text.startswith("years") <= (parse_label(text) == (set(), set()))


@pytest.mark.parametrize("text", ["references to dogs", "the word “the”", "a → b", "→", "“"])
def test_labels_in_prose_are_not_judged(text: str) -> None:
    assert parse_label(text) == (set(), set())


def test_label_fit_is_counted_as_by_hand() -> None:
    ids = random.Random(0).choices(range(len(WORDS)), k=60)
    tokens = tokens_of(ids)
    labels = {0: "“the”", 1: "“cat” → “paris”", 2: "→ “!”", 3: "about cats", 5: "“⏎”, “unheard”"}
    features = [random.Random(i).choices(range(-1, 6), k=3) for i in range(60)]
    fit = LabelFit(labels, tokens, WORDS.__getitem__, 6)
    hits, expected, judged = fit.of(shown(*features))

    def right(feature: int, row: int) -> bool:
        now, after = (WORDS[i].strip().casefold() for i in (ids[row], ids[(row + 1) % 60]))
        by_label = {0: now == "the", 1: now == "cat" or after == "paris", 2: after == "!"}
        return by_label.get(feature, WORDS[ids[row]] == "\n" and feature == 5)

    for row, listed in enumerate(features):
        known = [f for f in listed if f in (0, 1, 2, 5)]
        assert int(judged[row]) == len(known)
        assert int(hits[row]) == sum(right(f, row) for f in known)
        chance = [sum(right(f, other) for other in range(60)) / 60 for f in known]
        assert float(expected[row]) == pytest.approx(sum(chance))


def test_bits_are_the_entropy_when_features_name_the_target_and_none_by_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.randint(8, (4000,), generator=draw)
    tokens = tokens_of(target.tolist(), documents=40)
    noise = torch.randint(8, 40, (4000, 2), generator=draw)
    named = shown(*torch.cat([noise, target[:, None]], dim=1).tolist())
    assert float(information(named, tokens, target).mean()) == pytest.approx(3.0, abs=0.1)
    assert abs(float(information(shown(*noise.tolist()), tokens, target).mean())) < 0.02


def test_bits_are_told_of_documents_that_the_model_did_not_see() -> None:
    common = torch.randint(8, (40, 25), generator=torch.Generator().manual_seed(0))
    peculiar = torch.arange(8, 48)[:, None].expand(40, 25)  # to each document
    target = torch.cat([common, peculiar], dim=1).reshape(-1)
    tokens = tokens_of(target.tolist(), documents=40)
    bits = information(shown(*target[:, None].tolist()), tokens, target)
    assert float(bits[target < 8].mean()) > 1
    assert float(bits[target >= 8].mean()) <= 0


def test_kept_is_the_overlap_with_the_token_before() -> None:
    tokens = tokens_of([0] * 6, documents=2)
    tokens.position[2] = 7  # something was left out before it
    found = shown([1, 2, 3], [3, 2, 4], [3, 2, 4], [5, 6, -1], [5, -1, -1], [-1, -1, -1])
    overlap, follows = kept(found, tokens)
    assert follows.tolist() == [0, 1, 0, 0, 1, 1]
    assert overlap.tolist() == [0, 0.5, 0, 0, 0.5, 0]


def test_explained_is_all_when_all_that_fires_is_shown(
    make_sae: Callable[..., SAE], make_rows: Callable[..., Tensor]
) -> None:
    sae = make_sae()
    activation = sae.encode(make_rows(sae, 300))
    most = activation.topk(60, dim=1)
    feature = most.indices.masked_fill(most.values == 0, -1)
    tokens = tokens_of([0] * 300, residual=sae.decode(activation))
    calibration = Calibration.empty(sae.width)
    calibration.tokens, calibration.total = 300, activation.double().sum(0)
    for k in (60, 5):
        error, spread = unexplained(
            Shown(feature[:, :k], most.values[:, :k]), tokens, sae, calibration
        )
        x = torch.zeros_like(activation).scatter_(1, most.indices[:, :k], most.values[:, :k])
        known = torch.zeros_like(x, dtype=torch.bool).scatter_(1, most.indices[:, :k], True)
        guess = torch.where(known & (x > 0), x, calibration.mean.float())
        expected = (tokens.residual - sae.decode(guess)).square().sum(1)
        torch.testing.assert_close(error.float(), expected, rtol=1e-3, atol=1e-2)
    assert error.sum() < spread.sum()


def test_an_interval_is_that_of_documents_and_not_of_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    of_document = torch.randn(100, generator=draw)
    document = torch.arange(100).repeat_interleave(30)
    boot = Bootstrap(100)
    for figure in (boot.mean, boot.median):
        value, low, high = interval(figure(document, of_document[document]))
        assert low < value < high
        assert high - low == pytest.approx(2 * 1.96 / 10, rel=0.4)
    mean = boot.mean(document, of_document[document])
    assert interval(mean - mean)[1:] == (0.0, 0.0)
    assert float(mean[0]) == pytest.approx(float(of_document.mean()))


def figure(value: float, noise: Tensor) -> Tensor:
    return torch.cat([torch.tensor([value]).double(), value + noise])


def test_the_rule_that_picks() -> None:
    noise = torch.linspace(-0.02, 0.02, DRAWS).double()
    own = -noise
    kl = {"a": 0.5, "b": 0.9, "c": 0.1, "d": 0.6, RANDOM: 0.1}
    median = {name: figure(value, 0 * noise) for name, value in kl.items()}
    fit = {"a": figure(0.40, noise), "d": figure(0.41, own), "c": figure(0.9, noise)}
    # c fits best, but shows what matters no more than chance; a is tied with d, which weighs more.
    assert verdict(fit, median) == "d"
    assert verdict(fit | {"b": figure(0.2, noise)}, median) == "d"
    assert verdict(fit | {"b": figure(0.4, noise)}, median) == "b"
    assert verdict({"c": fit["c"]}, median) is None


def test_what_is_shown_is_what_the_ranker_prefers() -> None:
    tokens = tokens_of([0, 0])._replace(
        feature=torch.tensor([[0, 1, 2, 3], [1, 3, -1, -1]]),
        activation=torch.tensor([[9.0, 1.0, 3.0, 2.0], [1.0, 2.0, 0.0, 0.0]]),
    )
    ranker = make_ranker("activation", width=4)
    ranker.mask[0] = True
    assert shown_by(ranker, tokens, 2).feature.tolist() == [[2, 3], [3, 1]]
    assert shown_by(ranker, tokens, 3).activation.tolist() == [[3, 2, 1], [2, 1, 0]]
    drawn = shown_by(ranker, tokens, 2, at_random=True).feature.tolist()
    assert set(drawn[0]) < {1, 2, 3}
    assert set(drawn[1]) == {1, 3}


def test_sinks_special_tokens_and_repeated_contexts_are_left_out(
    make_sae: Callable[..., SAE], make_rows: Callable[..., Tensor]
) -> None:
    sae = make_sae()
    rows = make_rows(sae, 8)
    rows[5] *= 100
    sequences = [[7, 1, 2, 3, 4, 9, 5, 6], [7, 1, 2, 8, 4, 3]]
    tokens = gather(sae, sequences, lambda ids: rows[: len(ids)], {4}, float(rows[5].norm()) - 1)
    assert list(zip(tokens.document.tolist(), tokens.position.tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (0, 6), (1, 3),
    ]  # fmt: skip
    assert tokens.token_id.tolist() == [1, 2, 3, 5, 8]
    assert tokens.next_id.tolist() == [2, 3, 4, 6, 4]
    for row, position in enumerate(tokens.position.tolist()):
        active = sae.encode(rows[position : position + 1])[0]
        listed = tokens.feature[row] >= 0
        assert tokens.feature[row][listed].tolist() == active.nonzero().squeeze(1).tolist()
        torch.testing.assert_close(tokens.activation[row][listed], active[active > 0])


def next_log_probability(model: Path, ids: list[int], layer: int, edit: Tensor) -> Tensor:
    """After `ids`, with `edit` added to the last token's residual: a whole run, no cache."""
    hf = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )

    def hook(module: object, args: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], output[:, -1:] + edit], dim=1)

    hf.model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        return hf(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gemma2"])
def test_kl_is_that_of_a_whole_run_without_the_features(
    family: str, tiny_sae: Path, request: pytest.FixtureRequest
) -> None:
    path, sae, layer = request.getfixturevalue(family), load_sae(tiny_sae), 20
    ids = [2, 40, 41, 300, 17, 17, 99, 5]
    ablator = Ablator(str(path), layer)
    tokens = gather(sae, [ids], ablator.residual, [], float("inf"))
    ranked = [shown_by(make_ranker("activation", width=sae.width), tokens, k) for k in (1, 4, 4)]
    for row in (1, 4):
        context = ids[: int(tokens.position[row]) + 1]
        found = ablate(ranked, tokens, row, sae, partial(ablator.next_logits, context))
        plain = next_log_probability(path, context, layer, torch.zeros(sae.d_model))
        for one, kl in zip(ranked, found.tolist(), strict=True):
            removed = one.activation[row] @ sae.W_dec[one.feature[row]]
            without = next_log_probability(path, context, layer, -removed)
            expected = float((plain.exp() * (plain - without)).sum())
            assert expected > 1e-4
            assert kl == pytest.approx(expected, rel=1e-3)


def bench(*words: object) -> Result:
    return CliRunner().invoke(main, ["bench", "ranking", *map(str, words)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    words = " ".join(TRAINING_TEXT).split()
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=20))}) for _ in range(12)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def described_sae(tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("described") / "layer_20"
    shutil.copytree(tiny_sae, folder)
    labels = (Label(index, "“the”, “of” → “is”", "tokens") for index in range(0, 512, 2))
    LabelSet("tokens", labels).save(folder / "labels" / "tokens.jsonl")
    write_calibration(folder / "calibration.safetensors", width=512, sink_norm=1e9)
    return folder


def test_the_command_judges_every_ranking(
    tiny_llama: Path, described_sae: Path, corpus: Path
) -> None:
    done = bench(
        tiny_llama, "--sae", described_sae, "--corpus", corpus, "--max-tokens", 32,
        "--ablations", 10, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["documents"] >= 12
    assert report["ablated_tokens"] == 10
    names = {(r["ranking"], r["max_frequency"], r["k"]) for r in report["rows"]}
    assert names == {
        (name, f, k) for name in (*RANKINGS, RANDOM) for f in (0.5, 0.1, 0.01) for k in (3, 8)
    }
    for row in report["rows"]:
        value, low, high = row["kl_mean"]
        assert 0 < low <= value <= high
        assert row["shown"][0] == row["k"]  # of some fifty that fire
        assert not any(math.isnan(v) for v in row["label_fit"])
        # All labels are the same, so no ranking can gain much by them.
        assert row["label_lift"][0] == pytest.approx(1.0, abs=0.5)


def test_the_tables_are_markdown(tiny_llama: Path, described_sae: Path, corpus: Path) -> None:
    done = bench(tiny_llama, "--sae", described_sae, "--corpus", corpus, "--ablations", 10)
    assert done.exit_code == 0, done.output
    tables = [block.splitlines() for block in done.stdout.split("\n\n") if block[0] == "|"]
    assert len(tables) == 6
    for table in tables:
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
        assert {len(row) for row in rows} == {12}
        assert [row[0] for row in rows[2:]] == [*RANKINGS, RANDOM]
        assert all(float(row[1].split(" ± ")[0]) < 1 for row in rows[2:])


def test_what_is_missing_is_said_in_a_sentence(
    tiny_llama: Path, tiny_sae: Path, described_sae: Path, corpus: Path, tmp_path: Path
) -> None:
    without = tmp_path / "without"
    shutil.copytree(described_sae, without)
    (without / "calibration.safetensors").unlink()
    for words, said in {
        (tiny_llama, "--sae", tiny_sae, "--corpus", corpus): "has no labels of the labeller tokens",
        (tiny_llama, "--sae", without, "--corpus", corpus): "has no calibration, which rankings",
        (tiny_llama, "--sae", without, "--sae", tiny_sae, "--corpus", corpus): "give one --sae",
        (tiny_llama, "--sae", described_sae, "--corpus", corpus, "--layer", 26): "has 26 layers",
        (tiny_llama, "--sae", described_sae): "Missing option '--corpus'",
        (tmp_path, "--sae", described_sae, "--corpus", corpus): "can not be loaded with transf",
    }.items():
        done = bench(*words)
        assert done.exit_code in (1, 2)
        assert said in done.output
        assert "Traceback" not in done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
