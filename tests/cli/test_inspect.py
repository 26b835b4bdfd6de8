"""`neuroscope inspect`: from a running server and offline, which must agree."""

from __future__ import annotations

import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import DATA_VARIABLE
from neuroscope_vllm.core.inspection.record import Inspection
from tests.cli.conftest import SINK_NORM
from tests.support.models import write_saelens_sae
from tests.support.oracle import Comparison, Oracle
from tests.support.served import Served

TEXTS = (
    "Paris is the capital of France 🦊 你好; the quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
)


def inspect(*words: str, stdin: str | bytes | None = None, **environ: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["inspect", *words], input=stdin, env=environ)
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stdout, result.stderr


def records(*words: str, **options: Any) -> list[dict[str, Any]]:
    code, out, err = inspect(*words, "--json", **options)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def refusal(*words: str, code: int = 1, **options: Any) -> str:
    """What is said, without line breaks, when it ends with `code`."""
    found, out, err = inspect(*words, **options)
    assert (found, out) == (code, ""), err
    return " ".join(err.replace("│", " ").split())


@pytest.fixture(autouse=True)
def _keep_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets it for its own process, which here is that of all tests."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module")
def here(tiny_llama: Path, labelled_sae: Path) -> tuple[str, ...]:
    """Options that run the served model and SAE without a server."""
    return ("--model", str(tiny_llama), "--sae", str(labelled_sae))


@pytest.fixture(scope="module")
def offline(here: tuple[str, ...]) -> list[dict[str, Any]]:
    return records(*TEXTS, *here)


@pytest.mark.parametrize("chat", [(), ("--chat",)])
def test_a_server_and_an_offline_run_agree(
    served: Served, here: tuple[str, ...], chat: tuple[str, ...]
) -> None:
    asked = records(*TEXTS, *chat, "--url", served.features)
    again = records(*TEXTS, *chat, "--url", served.features)  # now in vLLM's prefix cache
    computed = records(*TEXTS, *chat, *here)
    for one, repeated, other in zip(asked, again, computed, strict=True):
        assert one["text"] == other["text"]
        assert one["chat"] == other["chat"] == bool(chat)
        assert_same_tokens(one["tokens"], other["tokens"])
        assert_same_tokens(repeated["tokens"], other["tokens"])
        assert (one["sites"][0]["ranking"], one["sites"][0]["top_k"]) == ("zscore", 8)
        assert one["sites"][0] == other["sites"][0]
    seen = [token for one in computed for token in one["tokens"]]
    assert any(token["sink"] for token in seen)
    assert any(token["special"] for token in seen) == bool(chat)
    assert any(f["label"] for token in seen for f in token["top_features"])


def assert_same_tokens(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for name in ("position", "token", "token_id", "layer", "features_at", "sink", "special"):
            assert one[name] == other[name], name
        assert (one["l0"] is None) == (other["l0"] is None)
        assert abs((one["l0"] or 0) - (other["l0"] or 0)) <= 1
        mine = {f["index"]: f for f in one["top_features"]}
        theirs = {f["index"]: f for f in other["top_features"]}
        # Two features closer to each other than rounding may trade the last place.
        assert len(mine.keys() ^ theirs.keys()) <= 2
        for index in mine.keys() & theirs.keys():
            assert mine[index]["label"] == theirs[index]["label"]
            for name in ("activation", "score"):
                assert mine[index][name] == pytest.approx(theirs[index][name], rel=1e-3)


def test_offline_equals_transformers_and_sae_lens(
    here: tuple[str, ...], tiny_llama: Path, labelled_sae: Path
) -> None:
    oracle = Oracle(tiny_llama, {20: labelled_sae}, {20: SINK_NORM})
    comparison = Comparison()
    for one in records(*TEXTS, *here, NEUROSCOPE_RANKING="activation"):
        context = [token["token_id"] for token in one["tokens"]]
        events = [{"internal_id": one["text"], **token} for token in one["tokens"]]
        oracle.compare(context, events, comparison)
    assert comparison.wrong == []
    assert comparison.rows > 30
    assert comparison.sinks > 0


def test_several_layers(here: tuple[str, ...], tiny_llama: Path, tmp_path: Path) -> None:
    low = write_saelens_sae(tmp_path / "layer_3", d_model=64, width=64, layer=3, scale=0.3, seed=1)
    (one,) = records(TEXTS[1], *here, "--sae", str(low), "--feature", "2")
    places = [(token["position"], token["layer"]) for token in one["tokens"]]
    assert places == [(at, layer) for at in range(len(places) // 2) for layer in (3, 20)]
    assert [site["layer"] for site in one["sites"]] == [3, 20]
    assert {feature["layer"] for feature in one["features"]} == {3, 20}
    lower = [token for token in one["tokens"] if token["layer"] == 3]
    comparison = Comparison()
    events = [{"internal_id": "", **token} for token in lower]
    oracle = Oracle(tiny_llama, {3: low}, {3: math.inf})
    oracle.compare([token["token_id"] for token in lower], events, comparison)
    assert (comparison.wrong, comparison.rows) == ([], len(lower))
    assert any(token["top_features"] for token in lower)
    assert "numbered 0 to 63" in refusal("hi", *here, "--sae", str(low), "--feature", "100")
    code, out, _ = inspect(TEXTS[1], *here, "--sae", str(low))
    assert code == 0
    assert "layer 3" in out
    assert "layer 20" in out


def test_the_json_is_of_the_documented_form(offline: list[dict[str, Any]]) -> None:
    for one, text in zip(offline, TEXTS, strict=True):
        msgspec.convert(one, Inspection)
        assert list(one) == [
            *("text", "file", "chat", "model", "source", "sites", "tokens", "features")
        ]
        assert (one["text"], one["file"], one["source"]) == (text, None, "transformers")
        assert [token["position"] for token in one["tokens"]] == list(range(len(one["tokens"])))
        # Characters of several tokens come whole, with the last of them.
        assert "".join(token["token"] for token in one["tokens"]) == text
        assert any(token["token"] == "" for token in one["tokens"]) == ("🦊" in text)
        for token in one["tokens"]:
            scores = [feature["score"] for feature in token["top_features"]]
            assert scores == sorted(scores, reverse=True)
            assert (len(scores) == 0) == token["sink"]


def test_special_tokens_are_shown_without_features(here: tuple[str, ...]) -> None:
    (one,) = records("hello", "--chat", *here)
    first = one["tokens"][0]
    assert (first["token"], first["special"], first["sink"]) == ("<bos>", True, False)
    assert (first["top_features"], first["l0"], first["features_at"]) == ([], None, None)
    special = [token["token"] for token in one["tokens"] if token["special"]]
    assert special == ["<bos>", "<turn>", "<end>", "<turn>"]


def test_a_feature_is_followed_whatever_its_rank(
    here: tuple[str, ...], tiny_llama: Path, labelled_sae: Path
) -> None:
    words = ("--feature", "30", "--feature", "31", "--top-k", "1", "--chat")
    (one,) = records(TEXTS[0], *here, *words)
    oracle = Oracle(tiny_llama, {20: labelled_sae}, {20: math.inf})
    residual = oracle.residuals([token["token_id"] for token in one["tokens"]])[20]
    expected = oracle.saes[20].encode(residual).detach()
    assert [(f["index"], f["label"], f["layer"]) for f in one["features"]] == [
        (30, "meaning 30", 20),
        (31, None, 20),
    ]
    for feature in one["features"]:
        for token, value in zip(one["tokens"], feature["activations"], strict=True):
            if token["special"] or token["sink"]:
                assert value is None
            else:
                want = float(expected[token["position"], feature["index"]])
                assert value == pytest.approx(want, rel=1e-3, abs=1e-3)
        assert max(value or 0.0 for value in feature["activations"]) > 0
    code, out, _ = inspect(TEXTS[0], *here, "--feature", "30")
    assert code == 0
    assert "[30] meaning 30" in out


def test_without_a_calibration_activation_ranks_and_it_says_so(
    tiny_llama: Path, tiny_sae: Path
) -> None:
    code, out, err = inspect("hi", "--model", str(tiny_llama), "--sae", str(tiny_sae), "--json")
    assert code == 0
    assert json.loads(out)["sites"][0]["ranking"] == "activation"
    assert "has no calibration" in err


def test_files_stdin_and_texts(here: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text("from a file\n")
    found = records("-", "an argument", "--file", str(file), *here, stdin="piped 😀")
    assert [(one["text"], one["file"]) for one in found] == [
        ("piped 😀", "-"),
        ("an argument", None),
        ("from a file\n", str(file)),
    ]


def test_a_files_name_need_not_be_text(here: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"f\xff.txt")
    file.write_text("hi")
    shown = str(tmp_path / "f\ufffd.txt")
    (one,) = records("--file", str(file), *here)
    assert one["file"] == shown
    page = tmp_path / "page.html"
    code, _, err = inspect("--file", str(file), *here, "--html", str(page))
    assert code == 0, err
    assert shown in page.read_text(encoding="utf-8")
    assert inspect("--file", str(file), *here)[0] == 0


def test_the_table_of_one_short_token(here: tuple[str, ...]) -> None:
    code, out, _ = inspect("a", *here, COLUMNS="80")
    assert code == 0
    assert re.search(r"│ token +┃|┃ token +┃", out)
    assert "best features by zscore, with activations" in out


def test_the_table_fits_80_columns(here: tuple[str, ...]) -> None:
    hostile = "a [bold]b[/bold] \x1b[31mred \u202e 😀"
    code, out, err = inspect(hostile, *here, "--feature", "3", COLUMNS="80")
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert {(cell_len(line), line[-1]) for line in rows} == {(80, "│")}
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]" in out.replace("│", "").replace(" ", "").replace("\n", "")
    assert "attention sink" in out or "meaning" in out


def test_a_page_is_written(served: Served, here: tuple[str, ...], tmp_path: Path) -> None:
    for words in (("--url", served.features), here):
        path = tmp_path / "page.html"
        code, out, err = inspect(*TEXTS, *words, "--html", str(path))
        assert (code, out) == (0, ""), err
        assert str(path) in err
        check_page(path, complete=words == here)


def check_page(path: Path, complete: bool) -> None:
    """Every top feature fires where it is one, and none on what is shown without features."""
    data = re.search(r'id="data">(.*)</script>', path.read_text(encoding="utf-8"))
    assert data is not None
    texts = json.loads(data[1])["texts"]
    assert [text["complete"] for text in texts] == [complete] * len(TEXTS)
    for text, given in zip(texts, TEXTS, strict=True):
        assert "".join(word for _, word, _ in text["tokens"]) == given
        rows, firings = text["layers"]["20"]["rows"], text["layers"]["20"]["firings"]
        top = {(at, f[0], f[1]) for at, row in enumerate(rows) for f in row["top"]}
        fires = {(at, int(f), value) for f, places in firings.items() for at, value in places}
        assert fires > top if complete else fires == top
        assert [at for at, _, _ in fires if rows[at]["note"]] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("",), "is empty"),
        (("--file", "/no/such/file"), "can not be read (No such file"),
        (("hi", "--layer", "5"), "layer 20"),
        (("hi", "--feature", "512"), "numbered 0 to 511"),
        (("hi", "--top-k", "129"), "between 1 and 128"),
        (("word " * 3000,), "but"),
        (("hi", "--html", "/no/such/folder/page.html"), "--html"),
    ],
)
def test_what_can_not_be_done_is_said(
    here: tuple[str, ...], words: tuple[str, ...], said: str
) -> None:
    assert said in refusal(*words, *here)


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x00\xff", "Ünïcode".encode("utf-16"), b"caf\xe9"])
def test_what_is_no_text_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "binary"
    file.write_bytes(data)
    assert "is not text in UTF-8" in refusal("--file", str(file))
    assert "is not text in UTF-8" in refusal("-", stdin=data)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give a TEXT"),
        (("-", "-"), "stdin can be read once"),
        (("hi", "--feature", "3"), "--feature needs --model"),
        (("hi", "--sae", "s"), "--sae is for --model"),
        (("hi", "--backend", "vllm"), "--backend is for --model"),
        (("hi", "--model", "m"), "--sae"),
        (("hi", "--model", "demo", "--url", "http://127.0.0.1:1"), "give one"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], said: str) -> None:
    assert said in refusal(*words, code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("word " * 3000,), "can not be inspected"),
        (("hi", "--layer", "5"), "does not observe layer 5; it observes 20."),
        (("hi", "--top-k", "9"), "reports 8 features a token, not 9"),
    ],
)
def test_what_a_server_can_not_do(served: Served, words: tuple[str, ...], said: str) -> None:
    assert said in refusal(*words, "--url", served.features)


def test_fewer_features_of_a_server(served: Served) -> None:
    (one,) = records("hi", "--top-k", "2", "--layer", "20", "--url", served.features)
    assert {len(token["top_features"]) for token in one["tokens"]} <= {0, 2}
    assert one["sites"][0]["top_k"] == 2


def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        said = refusal("hi", "--url", f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert "no feature stream answers" in said


def test_labels_of_the_data_folder_are_found(
    here: tuple[str, ...], labelled_sae: Path, tmp_path: Path
) -> None:
    from neuroscope_vllm.core import artefacts
    from neuroscope_vllm.core.labels import Label, LabelSet

    data = {DATA_VARIABLE: str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATA_VARIABLE, str(tmp_path))
        path = artefacts.labels_file(str(labelled_sae), "scored")
    LabelSet("scored", [Label(i, f"better {i}", "scored", score=0.9) for i in range(512)]).save(
        path
    )
    (one,) = records("hello world", *here, **data)
    labels = {f["label"] for token in one["tokens"] for f in token["top_features"]}
    assert labels
    assert all(label.startswith("better") for label in labels)
    assert not any("unreliable" in f for token in one["tokens"] for f in token["top_features"])
    # An unreliable labeller comes last: it names what the SAE's own labels do not, odd features.
    LabelSet("scored", [Label(i, "doubtful", "scored", score=0.5) for i in range(512)]).save(path)
    words = ("hello world", *here, "--feature", "1")
    (again,) = records(*words, **data)
    doubted = [f for token in again["tokens"] for f in token["top_features"]]
    assert all(f.get("unreliable", False) is (f["label"] == "doubtful") for f in doubted)
    assert {f["label"] == "doubtful" for f in doubted} == {True, False}
    assert again["features"][0]["unreliable"] is True
    _, table, _ = inspect(*words, **data, COLUMNS="200")
    assert "doubtful (unreliable)" in table
