"""`neuroscope patch`, on transformers: what it recovers, how it shows it, what it refuses."""

from __future__ import annotations

import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest
import sae_lens
import torch
from transformers import AutoTokenizer

from neuroscope_vllm.cli.tokenized import prompt_ids
from neuroscope_vllm.core.patching.record import Patching
from neuroscope_vllm.core.patching.swap import Replacement
from tests.support.models import write_saelens_sae, write_tiny_model
from tests.support.patching import Plain, patch, record

CLEAN, CORRUPTED = "Paris is the capital of France", "Paris is the capital of Italy"
LONGER = "Rome is old; Paris is the capital of France"
ANSWERS = ("--answer", "x", "--wrong", "+")
LAYERS = (0, 2, 4)


def refusal(*words: str, code: int = 1) -> str:
    found, out, err = patch(*words)
    assert (found, out) == (code, ""), err
    return " ".join(err.split())


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("patch") / "m", request.param, layers=5)


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads layer 2; dense enough that prompts differ in it."""
    folder = tmp_path_factory.mktemp("patch-sae") / "layer_2"
    return write_saelens_sae(folder, d_model=64, width=256, layer=2, scale=0.3)


def options(model: Path, *words: str) -> tuple[str, ...]:
    return (*ANSWERS, "--model", str(model), *words)


def alike(text: str, model: Path) -> str:
    """The corrupted prompt: with as many tokens as the clean one, some of the last ones others."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for end in ("Italy", "It aly", "Ital", "Rome", "ital y", "cities", "lazy", "Italia"):
        other = f"{text.rpartition(' ')[0]} {end}"
        if len(tokenizer.encode(other)) == len(tokenizer.encode(text)):
            return other
    raise AssertionError("no prompt of that length")


def telling(model: Path, *prompts: str, chat: bool = False) -> tuple[str, ...]:
    """Answers that are single letters, which the two prompts differ in most."""
    tokenizer, plain = AutoTokenizer.from_pretrained(model), Plain(model)
    after = [plain.next(prompt_ids(tokenizer, text, chat, ""), []) for text in prompts]
    ids = {tokenizer.encode(letter)[0]: letter for letter in "abcdefghijklmnopqrstuvwxyz"}
    gain = (after[0] - after[1])[list(ids)]
    letters = list(ids.values())
    return "--answer", letters[int(gain.argmax())], "--wrong", letters[int(gain.argmin())]


@pytest.fixture(scope="module")
def prompts(model: Path) -> tuple[str, str]:
    return CLEAN, alike(CLEAN, model)


@pytest.mark.parametrize("direction", [(), ("--noising",)])
def test_all_positions_recover_all_and_none_nothing(
    model: Path, prompts: tuple[str, str], direction: tuple[str, ...]
) -> None:
    found = record(*prompts, *options(model, "--positions", "all", *direction))
    assert [row.layer for row in found.rows] == list(range(5))
    assert [column.position for column in found.columns] == list(range(len(found.into.tokens)))
    same = sum(
        a == b for a, b in zip(found.clean.token_ids, found.corrupted.token_ids, strict=True)
    )
    assert same >= 2
    full, nothing = (0.0, 1.0) if direction else (1.0, 0.0)
    for row in found.rows:
        assert row.recovered_of_all == pytest.approx(full, abs=1e-3)
        # Before the first token that differs there is nothing to put from one run into the other.
        first = next(at for at, token in enumerate(found.clean.token_ids)
                     if token != found.corrupted.token_ids[at])  # fmt: skip
        assert row.recovered[:first] == pytest.approx([nothing] * first, abs=1e-3)
    # After the last layer only the last position is read.
    assert found.rows[-1].recovered[:-1] == pytest.approx(
        [nothing] * (len(found.columns) - 1), abs=1e-3
    )
    assert found.rows[-1].recovered[-1] == pytest.approx(full, abs=1e-3)


def reference(
    model: Path, found: Patching, cell: Sequence[int], sae: Path | None, features: list[int] | None
) -> float:
    """The metric with position cell[1] of layer cell[0] patched, by code that is not ours."""
    plain = Plain(model)
    layer, position, source = cell
    x = plain.residuals(found.into.token_ids)[layer][position]
    y = plain.residuals(found.source.token_ids)[layer][source]
    new = y
    if sae is not None:
        lens = sae_lens.SAE.load_from_disk(sae)
        with torch.no_grad():
            change = lens.encode(y[None])[0] - lens.encode(x[None])[0]
            if features is not None:
                kept = torch.zeros_like(change)
                kept[features] = change[features]
                change = kept
            assert change.abs().sum() > 0 or features
            new = x + change @ lens.W_dec
    after = plain.next(found.into.token_ids, [Replacement(layer, position, new)])
    return float(after[found.answer.token_id] - after[found.wrong.token_id])


@pytest.mark.parametrize("noising", [False, True])
@pytest.mark.parametrize("kind", ["residual", "features", "some"])
def test_every_cell_is_that_of_a_forward_hook(
    model: Path, sae: Path, prompts: tuple[str, str], kind: str, noising: bool
) -> None:
    words = ["--noising"] * noising
    words += ["--layers", "0,2,4"] if kind == "residual" else ["--kind", "features"]
    words += [] if kind == "residual" else ["--sae", str(sae)]
    words += ["--features", "0-99,150"] if kind == "some" else []
    found = record(*prompts, *options(model, *words))
    assert [row.layer for row in found.rows] == ([0, 2, 4] if kind == "residual" else [2])
    plain = Plain(model)
    ends = [
        float(n[found.answer.token_id] - n[found.wrong.token_id])
        for n in (plain.next(p.token_ids, []) for p in (found.clean, found.corrupted))
    ]
    assert [found.metric_of_clean, found.metric_of_corrupted] == pytest.approx(ends, abs=1e-4)
    for row in found.rows:
        assert row.features == ([*range(100), 150] if kind == "some" else None)
        for column, metric, recovered in zip(found.columns, row.metric, row.recovered, strict=True):
            assert column.source == column.position
            want = reference(
                model,
                found,
                (row.layer, column.position, column.source),
                None if kind == "residual" else sae,
                row.features,
            )
            assert metric == pytest.approx(want, abs=1e-3)
            assert recovered == pytest.approx((want - ends[1]) / (ends[0] - ends[1]), abs=2e-2)


def test_each_feature_alone(model: Path, sae: Path, prompts: tuple[str, str]) -> None:
    words = ("--kind", "features", "--sae", str(sae), "--features", "12,5,7", "--each")
    found = record(*prompts, *options(model, *words))
    assert [(row.layer, row.features) for row in found.rows] == [(2, [5]), (2, [7]), (2, [12])]
    last = len(found.into.token_ids) - 1
    for row in found.rows:
        want = reference(model, found, (2, last, last), sae, row.features)
        assert row.metric[-1] == pytest.approx(want, abs=1e-3)


def test_prompts_of_different_lengths(model: Path) -> None:
    words = (CLEAN, LONGER, "--model", str(model), *telling(model, CLEAN, LONGER))
    said = refusal(*words)
    assert re.search(r"has \d+ tokens \('Paris?' .* the corrupted one \d+ \('R", said), said
    assert "--align" in said
    found = record(*words, "--align", "--positions", "all")
    unmatched = [column.position for column in found.columns if column.source is None]
    assert unmatched
    assert len(found.columns) == len(found.corrupted.token_ids)
    for column in found.columns:
        if column.source is not None and column.position > max(unmatched):
            assert (
                found.corrupted.token_ids[column.position] == found.clean.token_ids[column.source]
            )
    for row in found.rows:
        missing = [at for at, value in enumerate(row.recovered) if value is None]
        assert missing == unmatched == [at for at, m in enumerate(row.metric) if m is None]
    # Matched to the other run's own end, and read nowhere else, the last layer is whole.
    assert found.rows[-1].recovered[-1] == pytest.approx(1.0, abs=1e-3)
    code, out, _ = patch(*words, "--align", COLUMNS="80")
    assert code == 0
    assert "–" in out


def test_what_is_written(model: Path, prompts: tuple[str, str], tmp_path: Path) -> None:
    files = [tmp_path / "new" / f"map.{form}" for form in ("json", "html", "png", "svg")]
    words = [word for file in files for word in ("--output", str(file))]
    code, out, err = patch(*prompts, *options(model, *words, "--json"))
    assert code == 0, err
    assert all(f"Wrote {file}" in err for file in files)
    assert files[0].read_text() == out
    found = json.loads(out)
    assert found["columns"] == [
        {"position": at, "source": at}
        for at in range(found["columns"][0]["position"], len(found["clean"]["tokens"]))
    ]
    assert (found["kind"], found["direction"], found["backend"]) == (
        "residual",
        "denoising",
        "transformers",
    )
    assert "".join(found["clean"]["tokens"]) == CLEAN
    assert found["engine"].startswith("transformers")
    html = files[1].read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*)</script>', html)
    assert data is not None
    shown = [row["recovered"][:-1] for row in json.loads(data[1])["rows"]]
    assert shown == [row["recovered"] for row in found["rows"]]
    assert files[2].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ET.parse(files[3]).getroot().tag.endswith("svg")


def test_a_picture_of_hostile_text(model: Path, tmp_path: Path) -> None:
    clean, corrupted = (f"$x_{{\\bad 你 <b>&\x1b[31m\u202e {end} is" for end in ("cat", "zebra"))
    files = [tmp_path / "map.png", tmp_path / "map.svg"]
    words = [word for file in files for word in ("--output", str(file))]
    words += ["--model", str(model), *telling(model, clean, corrupted)]
    code, out, err = patch(clean, corrupted, "--align", *words, COLUMNS="80")
    assert code == 0, err
    assert files[0].stat().st_size > 1000
    ET.parse(files[1])
    assert "\x1b" not in out + err
    assert "\u202e" not in out + err


def test_the_table_fits_80_columns(model: Path, prompts: tuple[str, str]) -> None:
    words = options(model, "--positions", "all", "--layers", "0,4")
    code, out, err = patch(*prompts, *words, COLUMNS="80")
    assert code == 0, err
    found = record(*prompts, *words)
    assert max(map(len, out.splitlines())) <= 80
    values = {f"{v:z.3f}" for row in found.rows for v in row.recovered if v is not None}
    assert values <= set(out.split())
    assert "layer 4" in out
    assert "all" in out


def test_a_chat(model: Path, prompts: tuple[str, str]) -> None:
    words = ("--model", str(model), *telling(model, *prompts, chat=True))
    found = record(*prompts, *words, "--chat", "--layers", "4")
    assert found.chat
    assert found.clean.text == CLEAN
    assert "".join(found.clean.tokens).endswith("<turn>model\n")
    assert found.columns[0].position > 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layers", "5"), "layer 5 does not exist"),
        (("--positions", "2,300"), "position 300 does not exist"),
        (("--answer", "Paris is"), "--answer 'Paris is' is"),
        (("--answer", ""), "--answer '' is no token"),
        (("--wrong", "x"), "both the token 'x'"),
        (("--wrong", "\udcff"), "is not text in UTF-8"),
        (("--model", "/no/such"), "is no folder"),
        (("--output", "/proc/nothing/map.json"), "can not be made"),
        (("--kind", "features", "--sae", "/no/such"), "does not exist"),
    ],
)
def test_what_can_not_be_done_is_said(
    model: Path, prompts: tuple[str, str], words: tuple[str, ...], said: str
) -> None:
    assert said in refusal(*prompts, *options(model), *words)


def test_prompts_that_hardly_differ(model: Path) -> None:
    said = refusal(CLEAN, CLEAN, *options(model))
    found = re.search(r"is (\S+) on the clean prompt and (\S+) on the corrupted one", said)
    assert found is not None, said
    assert found[1] == found[2]
    assert "has no tokens" in refusal("", CLEAN, *options(model))
    assert "tokens, but" in refusal("word " * 3000, CLEAN, *options(model))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sae", "s"), "--sae is for --kind features"),
        (("--features", "3"), "--features is for --kind features"),
        (("--layer", "3"), "name those to patch with --layers"),
        (("--kind", "features", "--each"), "--each is for --features"),
        (("--kind", "features"), "name the SAE with --sae"),
        (("--layers", "3-1"), "is no list as in"),
        (("--positions", "x"), "is no list as in"),
        (("--features", "0-999999999", "--kind", "features"), "is no list as in"),
        (("--output", "map.jpg"), "ends with none of .json, .html, .png, .svg"),
        (("--", "--enforce-eager"), "is for vLLM"),
    ],
)
def test_wrong_usage(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refusal(CLEAN, CORRUPTED, *options(tmp_path), *words, code=2)


def test_features_and_saes_that_do_not_fit(
    model: Path, sae: Path, prompts: tuple[str, str], tmp_path: Path
) -> None:
    words = options(model, "--kind", "features", "--sae", str(sae))
    assert "numbered 0 to 255" in refusal(*prompts, *words, "--features", "3,256")
    assert "no SAE reads layer 3" in refusal(*prompts, *words, "--layers", "3", code=2)
    other = write_saelens_sae(tmp_path / "layer_2", d_model=32, width=64, layer=2)
    assert "residuals of size 32" in refusal(
        *prompts, *options(model, "--kind", "features", "--sae", str(other))
    )


def test_without_transformers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'neuroscope-vllm[hf]'" in refusal(CLEAN, CORRUPTED, *options(model))


def test_without_vllm(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):  # set for vLLM
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "vllm", None)
    said = refusal(CLEAN, CORRUPTED, *options(model, "--backend", "vllm"))
    assert "'neuroscope-vllm[cpu]' on a CPU, or use --backend transformers" in said


def test_without_matplotlib(
    model: Path, prompts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refusal(*prompts, *options(model, "--output", str(tmp_path / "map.png")))
    assert "pip install 'neuroscope-vllm[plots]'" in said
    assert os.listdir(tmp_path) == []
