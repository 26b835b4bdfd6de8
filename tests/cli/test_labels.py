"""`neuroscope labels` from the outside: what it keeps, shows and refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.demo import demo_sae
from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import labels_file
from neuroscope_vllm.core.labels import load_labels
from neuroscope_vllm.core.labels.neuronpedia_export import BASE_VARIABLE
from tests.server.side import http, make_tokenizer, wait_until
from tests.support.bucket import SOURCE, Bucket, jsonl, row, serve_bucket

ADDRESS = "hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
GEMMA = ("--sae", "gemma-scope", "--model", "google/gemma-2-2b-it", "--layer", "20")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROSCOPE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NEUROSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with serve_bucket() as bucket:
        monkeypatch.setenv(BASE_VARIABLE, bucket.url)
        yield bucket


def run(*words: str, answer: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["labels", *words], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def mine(tmp_path: Path, text: str, name: str = "mine.csv") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_neuronpedias_labels_come_by_the_saes_name_alone(bucket: Bucket) -> None:
    bucket.put([row(i, f"**feature** {i}") for i in range(0, 16384, 5)])
    bucket.put([row(1, "MAX_ACTIVATING_TOKENS"), row(2, " ")], source=f"{SOURCE}/explanations/x")
    bucket.busy_every = 4
    code, out, err = run("import", "neuronpedia", *GEMMA)
    assert (code, err) == (0, "")
    file = labels_file(ADDRESS, "neuronpedia")
    assert f"Imported 3,277 labels of 16,384 features into {file}" in out
    assert "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k" in out
    assert load_labels(file).get(10).text == "feature 10"
    assert load_labels(file).get(10).model == "gemini-2.5-flash-lite"
    bucket.asked.clear()
    code, _, err = run("import", "neuronpedia", SOURCE)
    assert (code, bucket.asked) == (0, [""])
    assert f"The SAE is {ADDRESS}." in err
    listed = json.loads(run("list", "--json", "--sae", ADDRESS)[1])
    assert listed["sae"] == ADDRESS
    assert [one["labels"] for one in listed["labellers"]] == [3277]


def test_a_cache_that_can_not_be_written_is_named(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put([row(1, "one")])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEUROSCOPE_CACHE", str(tmp_path / "file" / "cache"))
    for words in (["labels", "import", "neuronpedia", *GEMMA], ["demo", "--print-command"]):
        refused = CliRunner().invoke(main, words)
        assert refused.exit_code == 1
        assert "file/cache can not be written (Not a directory); make room there" in refused.stderr
        assert "NEUROSCOPE_CACHE" in refused.stderr


def test_a_hub_serves_what_was_imported_for_a_suites_name(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put([row(12082, "references to dogs"), row(3124, "San Francisco")])
    assert run("import", "neuronpedia", *GEMMA)[0] == 0
    model = tmp_path / "gemma-2-2b-it"
    model.mkdir()
    make_tokenizer().save(str(model / "tokenizer.json"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "hub", str(model), "--layer", "20"]
    words += ["--sae", "gemma-scope", "--hub", f"ipc://{tmp_path}/hub", "--features-port", port]
    hub = subprocess.Popen(words)
    try:
        url = f"http://127.0.0.1:{port}/v1/features/labels?q=dog"
        found = wait_until(lambda: answered(url, hub))
    finally:
        hub.terminate()
        hub.wait(10)
    assert [(one["layer"], one["index"], one["labeller"]) for one in found] == [
        (20, 12082, "neuronpedia")
    ]


def answered(url: str, hub: subprocess.Popen[bytes]) -> list[dict[str, Any]] | None:
    assert hub.poll() is None
    try:
        return http.get(url).json()["data"]
    except httpx.TransportError:
        return None


def test_an_import_loads_no_torch_where_the_address_tells_the_shape(bucket: Bucket) -> None:
    bucket.put([row(1, "dogs")])
    code = (
        "import sys; from neuroscope_vllm.cli.main import main\n"
        f"main(['labels', 'import', 'neuronpedia', {SOURCE!r}], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == 0


def test_local_files_of_another_sae_are_refused(tmp_path: Path) -> None:
    export = tmp_path / "export" / "explanations"
    export.mkdir(parents=True)
    (export / "batch-0.jsonl").write_bytes(jsonl([row(8191, '"dogs"'), row(3, "The user wants")]))
    words = ("import", "neuronpedia", "--from", str(tmp_path / "export"), "--sae", str(demo_sae()))
    code, out, _ = run(*words)
    assert code == 0
    assert "Imported 1 labels" in out
    assert "1 texts with traces" in out
    (export / "batch-1.jsonl").write_bytes(jsonl([row(8192, "cats")]))
    code, _, err = run(*words)
    assert code == 1
    assert "feature 8192, but the SAE has 8,192 features" in err
    assert len(load_labels(labels_file(str(demo_sae()), "neuronpedia"))) == 1


def test_labels_are_listed_searched_and_shown_with_where_they_come_from(tmp_path: Path) -> None:
    file = mine(
        tmp_path,
        "index,text,labeller,score,method,model,created,examples,author\n"
        "7,[red]San Francisco[/],gpt,0.9,fuzz,gpt-5,2026-01-02,20,ann\n"
        "8,Paris in spring,gpt,0.3,fuzz,gpt-5,2026-01-03,20,ann\n",
    )
    assert run("import", file)[0] == 0
    code, out, err = run("list")
    assert code == 0
    assert "demo's SAE" in err
    assert out.splitlines()[0].split() == [
        *(
            "labeller",
            "labels",
            "scored",
            "unreliable",
            "mean",
            "score",
            "method",
            "model",
            "newest",
        )
    ]
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert list(rows) == ["manual", "gpt", "tokens"]  # by mean score
    assert rows["gpt"] == ["2", "2", "1", "0.60", "fuzz", "gpt-5", "2026-01-03"]
    _, out, _ = run("show", "7", "8")
    assert "[red]San Francisco[/]" in out
    assert "0.30 unreliable" in out
    assert out.count("unscored") == 2
    shown = json.loads(run("show", "7", "--labeller", "gpt", "--json")[1])
    assert shown == {
        "labels": [
            {
                "index": 7,
                "text": "[red]San Francisco[/]",
                "labeller": "gpt",
                "score": 0.9,
                "method": "fuzz",
                "model": "gpt-5",
                "created": "2026-01-02",
                "examples": 20,
                "author": "ann",
                **dict.fromkeys(("detection", "fuzzing", "scorer", "scored_on", "scoring")),
                **dict.fromkeys(("positives", "negatives")),
                "unreliable": False,
            }
        ]
    }
    found = json.loads(run("search", "spring", "par", "--labeller", "gpt", "--json")[1])
    assert [one["index"] for one in found["labels"]] == [8]
    assert "San Francisco" in run("search", "fran")[1]
    for query in ('"', "AND", "NEAR(", "*", "\udcff", "--", "'; DROP"):
        code, out, _ = run("search", "--labeller", "gpt", "--", query)
        assert (code, out) == (0, "")
    assert "no label holds 'zzzz'" in run("search", "zzzz")[2]
    assert "none of these features has a label" in run("show", "4095", "--labeller", "gpt")[2]


def test_escapes_and_markup_in_labels_reach_no_terminal(tmp_path: Path) -> None:
    text = "\x1b[2J\x1b]8;;http://evil\x07click\x1b]8;;\x07 \u202e<b>"
    file = mine(tmp_path, json.dumps({"index": 3, "text": text, "labeller": "evil"}), "x.jsonl")
    assert run("import", file)[0] == 0
    _, out, _ = run("show", "3", "--labeller", "evil")
    assert "]8;;http://evilclick]8;; <b>" in out
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_exports_can_be_imported_again(tmp_path: Path) -> None:
    everything = load_labels(demo_sae() / "labels" / "tokens.jsonl")
    assert run("export", "tokens")[1].encode() == everything.to_jsonl()
    for name in ("out.csv", "out.jsonl"):
        code, out, err = run("export", "tokens", "-o", str(tmp_path / name))
        assert (code, out) == (0, "")
        assert f"Wrote {len(everything):,} labels" in err
        labeller = f"of-{name}"
        assert run("import", str(tmp_path / name), "--labeller", labeller)[0] == 0
        again = load_labels(labels_file(str(demo_sae()), labeller))
        assert [(one.index, one.text) for one in again] == [
            (one.index, one.text) for one in everything
        ]
    assert run("export", "tokens", "--format", "csv")[1] == (tmp_path / "out.csv").read_text()


def test_an_import_adds_to_what_the_labeller_has(tmp_path: Path) -> None:
    run("import", mine(tmp_path, "index,text\n1,a\n2,b\n"), "--labeller", "me")
    run("import", mine(tmp_path, "index,text\n2,c\n3,d\n"), "--labeller", "me")
    kept = load_labels(labels_file(str(demo_sae()), "me"))
    assert [(label.index, label.text) for label in kept] == [(1, "a"), (2, "c"), (3, "d")]


def test_remove_asks_first_and_leaves_what_ships(tmp_path: Path) -> None:
    run("import", mine(tmp_path, "index,text\n1,a\n"), "--labeller", "me")
    file = labels_file(str(demo_sae()), "me")
    assert run("remove", "me", answer="n\n")[0] == 1
    assert run("remove", "me")[0] == 1
    assert file.is_file()
    code, out, _ = run("remove", "me", answer="y\n")
    assert code == 0
    assert "Removed 1 labels of me." in out
    assert not file.exists()
    run("import", mine(tmp_path, "index,text\n1,a\n"), "--labeller", "me")
    assert run("remove", "me", "--yes")[0] == 0
    code, _, err = run("remove", "tokens", "--yes")
    assert code == 1
    assert "came with the SAE" in err
    assert (demo_sae() / "labels" / "tokens.jsonl").is_file()


def test_a_damaged_file_takes_no_other_with_it_and_can_be_removed(tmp_path: Path) -> None:
    run("import", mine(tmp_path, "index,text\n1,a\n"), "--labeller", "z")
    file = labels_file(str(demo_sae()), "z")
    file.write_text('{"index":1}\n')
    listed = json.loads(run("list", "--json")[1])
    assert [one["labeller"] for one in listed["labellers"]] == ["manual", "tokens"]
    for words in (("search", "san", "--labeller", "tokens"), ("export", "tokens")):
        assert run(*words)[0] == 0
    again = ("import", mine(tmp_path, "index,text\n1,a\n"), "--labeller", "z")
    for words in (("search", "san", "--labeller", "z"), ("export", "z"), again):
        code, _, err = run(*words)
        assert (code, "z.jsonl is not a label" in err) == (1, True)
    code, out, _ = run("remove", "z", answer="y\n")
    assert code == 0
    assert "holds no labels that can be read" in out
    assert not file.exists()
    assert run(*again)[0] == 0


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    file = mine(tmp_path, "index,text\n1,a\n")
    assert run("import", file, "--labeller", "Me")[0] == 0
    for labeller, other in (("me", "Me"), ("TOKENS", "tokens")):
        code, _, err = run("import", file, "--labeller", labeller)
        assert code == 1
        assert f"labeller {labeller} differs from {other}, which has labels, in case only" in err
    assert run("import", file, "--labeller", "Me")[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("list", "--sae", "no/such"), 1, "SAE no/such does not exist"),
        (("list", "--sae", "gemma-scope"), 2, "needs --model and --layer"),
        (("list", "--layer", "3"), 2, "are for --sae gemma-scope"),
        (("list", "--sae", "gemma-scope", "--model", "gpt2", "--layer", "3"), 1, "no SAE of gpt2"),
        (("search", "\udcff", "--json"), 0, "demo's SAE"),
        (("export", "nobody"), 1, "no labels of 'nobody'"),
        (("export", "tokens", "-o", "/no/such/x"), 1, "/no/such/x can not be used: No such file"),
        (("remove", "nobody", "--yes"), 1, "its labellers: manual, tokens"),
        (("search", "x", "--labeller", "nobody"), 1, "no labels of 'nobody'"),
        (("show", "minus"), 2, "is not a valid integer"),
        (("show", "-1"), 2, "No such option"),
        (("import", "none.jsonl"), 1, "labels none.jsonl cannot be read (No such file"),
        (("import", "none.csv", "a/b"), 2, "are for neuronpedia, not for none.csv"),
        (("import", "neuronpedia"), 1, "records no source of Neuronpedia; give one"),
        (
            ("import", "neuronpedia", "gemma-2-2b/19-gemmascope-res-16k", *GEMMA),
            1,
            "is gemma-2-2b/20-gemmascope-res-16k on Neuronpedia, not gemma-2-2b/19-",
        ),
        (("import", "neuronpedia", "../.."), 1, "is no source of Neuronpedia"),
        (("import", "neuronpedia", "--labeller", "x"), 2, "--labeller is for a FILE"),
        (("import", "neuronpedia", "--from", "/no/such"), 2, "does not exist"),
    ],
)
def test_mistakes_are_explained(words: tuple[str, ...], code: int, says: str) -> None:
    got, _, err = run(*words)
    assert got == code
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("index,text\n1,a\n", (), "no column 'labeller' (or give one with --labeller)"),
        ("index,text\n1,a\n", ("--labeller", "../x"), "can not name a file"),
        ("index,text\n8192,a\n", ("--labeller", "x"), "feature 8192, but the SAE has 8,192"),
        ("index,text\nx,a\n", ("--labeller", "x"), "line 2 of"),
        ("index,text\n", ("--labeller", "x"), "holds no labels"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, text: str, words: tuple[str, ...], says: str
) -> None:
    code, _, err = run("import", mine(tmp_path, text), *words)
    assert code == 1
    assert says in err
    assert not (tmp_path / "data").exists()
