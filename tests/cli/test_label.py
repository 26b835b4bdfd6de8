"""`neuroscope label` from the outside, against a scripted language model on loopback."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoTokenizer
from vllm.entrypoints.launchers.run_batch import BatchRequestInput

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import home, labels_file, only_writer
from neuroscope_vllm.core.examples import Example, ExampleStore
from neuroscope_vllm.core.labels import Label, LabelSet, load_labels
from neuroscope_vllm.core.sae import load_sae
from tests.core.test_llm import FAULTS, often
from tests.support import models
from tests.support.batch import batch_output
from tests.support.llm_server import LLMServer
from tests.support.saes import edit_tensors
from tests.support.served import bin_path, environment
from tests.support.word_features import WordFeatures, word

WORDS = WordFeatures()
FIRING = [feature for feature in WORDS.features if WORDS.fires(feature).any()]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "examples"
    WORDS.write(folder)
    return folder


@pytest.fixture
def sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: Path) -> Path:
    """An SAE with examples, in a data folder of the test's own."""
    monkeypatch.setenv("NEUROSCOPE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("LLM_API_KEY", "OPENROUTER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "sae"
    folder.mkdir()
    shutil.copytree(examples, home(str(folder)) / "examples")
    return folder


def listed_words(user: str) -> list[str]:
    """The active words of all examples in a prompt."""
    lines = [line for line in user.splitlines() if line.startswith("Active: ")]
    return re.findall(r'" (w\d+x)" \d+', " ".join(lines))


def explain(system: str, user: str) -> dict[str, str]:
    """A good labeller: the word that most marks are on."""
    return {"label": f'**"{Counter(listed_words(user)).most_common(1)[0][0]}"**'}


def truth(feature: int) -> str:
    return word(feature % 1000).strip()


def run(sae: Path, *words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["label", "--sae", str(sae), *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def label(sae: Path, server: LLMServer, *words: object, code: int = 0) -> dict[str, Any]:
    found, out, err = run(sae, "--base-url", server.url, "--json", *words)
    assert found == code, (out, err)
    return json.loads(out)


def stored(sae: Path, labeller: str = "scripted") -> dict[int, Label]:
    """Labels by feature; fails if one is there twice."""
    lines = labels_file(str(sae), labeller).read_bytes().splitlines()
    indices = [json.loads(line)["index"] for line in lines]
    assert len(indices) == len(set(indices))
    return {one.index: one for one in load_labels(labels_file(str(sae), labeller))}


def test_no_label_is_lost_or_doubled_whatever_goes_wrong(
    sae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuroscope_vllm.core.autointerp.llm.FIRST_WAIT_S", 0.05)
    flags = ("--timeout", "0.6", "--concurrency", "16", "--min-examples", "3")
    with LLMServer(explain, fault=often(5, 0.5, *FAULTS)) as server:
        first = label(sae, server, *flags, code=1)
        billed = server.billed
    assert first["failed"]
    assert first["labelled"] == len(stored(sae)) > 40
    assert not first["failed"].keys() & {str(index) for index in stored(sae)}
    assert billed <= first["spent"]["cost"] + first["spent"]["lost"] + 1e-9
    with LLMServer(explain) as server:
        second = label(sae, server, *flags)
        assert len(server.asked) == len(first["failed"]) == second["labelled"]
        assert label(sae, server, *flags)["labelled"] == 0
        assert len(server.asked) == len(first["failed"])
    found = stored(sae)
    assert second["too_few_examples"] == len(FIRING) - len(found)
    assert {index: one.text for index, one in found.items()} == {i: truth(i) for i in found}
    one = found[5]
    assert (one.labeller, one.model) == ("scripted", "scripted")
    how = r"label@[0-9a-f]{12}: 10 strongest and 20 by quantile of examples d{8}\.[0-9a-f]{8}"
    assert re.fullmatch(how, one.method)
    assert 3 <= one.examples <= 30
    assert re.fullmatch(r"2\d\d\d-\d\d-\d\d", one.created)


def test_killed_three_times_it_goes_on_and_asks_nothing_twice(sae: Path) -> None:
    draw = random.Random(time.time_ns())
    concurrency = 4
    with LLMServer(explain, latency=0.08) as server:
        words = [bin_path("neuroscope"), "label", "--sae", str(sae), "--base-url", server.url]
        words += ["--concurrency", str(concurrency), "--min-examples", "3"]
        for _ in range(3):
            until = len(server.answered) + draw.randint(2, 14)
            process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL)
            wait_until(lambda n=until: len(server.answered) >= n)
            time.sleep(draw.random() * 0.08)
            process.send_signal(signal.SIGKILL)
            process.wait()
            path = labels_file(str(sae), "scripted")
            if path.stat().st_size:  # a kill seldom hits the moment of a write, so see to it
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size - draw.randint(2, 30))
        time.sleep(0.2)
        asked = len(server.asked)
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        again = Counter(server.asked)
        total = len(server.asked)
    found = stored(sae)
    assert {i: one.text for i, one in found.items()} == {i: truth(i) for i in found}
    assert len(again) == len(found) > 40
    # A kill costs what was in flight, and the line that we cut.
    assert total - len(found) <= 3 * (concurrency + 1)
    assert asked < total


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_stopped_by_hand_it_keeps_what_has_come(sae: Path) -> None:
    with LLMServer(explain, latency=0.1) as server:
        words = [bin_path("neuroscope"), "label", "--sae", str(sae), "--base-url", server.url]
        process = subprocess.Popen(
            [*words, "--concurrency", "2"],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        wait_until(lambda: len(server.answered) >= 6)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "give the same command again" in err
    assert "Traceback" not in err
    assert len(stored(sae)) >= 4


def test_a_run_costs_no_more_than_was_said_and_the_next_goes_on(sae: Path) -> None:
    with LLMServer(explain, latency=0.01) as server:
        plan = label(sae, server, "--dry-run")
        assert server.asked == []
        assert 0 < plan["cost"] < plan["cost_at_most"]
        assert plan["to_label"] + plan["too_few_examples"] == len(FIRING)
        assert not labels_file(str(sae), "scripted").exists()
        most = plan["cost"] / 2
        first = label(sae, server, "--max-cost", f"{most:.6f}", code=1)
        assert server.billed == pytest.approx(first["spent"]["cost"])
        assert server.billed <= most
        assert "could pass --max-cost" in first["stopped"]
        assert 0 < first["labelled"] == len(stored(sae))
        second = label(sae, server)
        assert first["labelled"] + second["labelled"] == plan["to_label"] == len(server.asked)
        assert server.billed == pytest.approx(plan["cost"], rel=0.5)
    with LLMServer(explain, prices=False) as server:
        code, _, err = run(sae, "--base-url", server.url, "--max-cost", "1", "--relabel")
        assert (code, server.asked) == (1, [])
        assert "the price of scripted is not known" in err


def test_a_labeller_sees_what_it_should(sae: Path) -> None:
    with LLMServer(explain) as server:
        label(sae, server, "--features", "3,4")
        body = server.bodies[0]
    store = ExampleStore(home(str(sae)) / "examples")
    for feature in (3, 4):
        user = next(user for user in server.asked if truth(feature) in explain("", user)["label"])
        texts = [line.partition(": ")[2] for line in user.splitlines() if line[:7] == "Example"]
        seen = {"".join(e.tokens): e for e in store.of(feature)}
        shown = [seen[re.sub("<<|>>", "", text)] for text in texts]
        assert not any(example.held_out for example in shown)
        places = {(e.sequence, p) for e in shown for p in range(e.position - e.at, window_end(e))}
        assert len(places) == sum(len(e.tokens) for e in shown)  # none overlap
        strengths = [e.activation for e in shown]
        strongest = max(e.activation for e in store.of(feature) if not e.held_out)
        assert strengths == sorted(strengths, reverse=True)
        assert strengths[0] == strongest
        assert 20 < len(shown) <= 30
        assert min(strengths[10:]) < 0.5 < 1.5 < max(strengths[10:])
        for example, text in zip(shown, texts, strict=True):
            least = 0.3 * max(example.activations)
            marked = [
                t for t, a in zip(example.tokens, example.activations, strict=True) if a > least
            ]
            assert "".join(marked) == "".join(re.findall("<<(.*?)>>", text))
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["label"]
    assert body["max_tokens"] == 200


def window_end(example: Example) -> int:
    return example.position - example.at + len(example.tokens)


def test_what_users_saw_comes_first(sae: Path, tmp_path: Path) -> None:
    def event(*features: int, layer: int = 20) -> str:
        shown = [{"index": i, "label": None, "activation": 1.0, "score": 1.0} for i in features]
        return json.dumps({"event": "token", "layer": layer, "top_features": shown}) + "\n"

    lines = [event(9, 12), event(12), event(5, layer=3), event(5, layer=3), event(5, layer=3)]
    lines += [json.dumps({"event": "request", "request_id": "r", "layers": [20]}) + "\n"]
    path = tmp_path / "traffic.ndjson"
    path.write_text("".join(lines) + event(7)[:-20])  # the recorder still runs
    with LLMServer(explain) as server:
        label(sae, server, "--traffic", path, "--concurrency", "1", "--limit", "4")
    first = [explain("", user)["label"].strip('*"') for user in server.asked]
    assert first == ["w12x", "w9x", "w0x", "w1x"]
    path.write_text("{}\nnothing\n")
    assert "line 2 of" in run(sae, "--traffic", path)[2]
    path.write_text(event(5, layer=3))
    assert "no feature of layer 20" in run(sae, "--traffic", path)[2]


def test_labellers_lie_side_by_side_and_are_labelled_anew_on_request(
    sae: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text("Say what it is.\n---\nHere: {examples}\n")
    with LLMServer(explain, models=("some/Model v2:free",)) as server:
        assert label(sae, server, "--features", "3")["labeller"] == "Model-v2-free"
        named = label(sae, server, "--features", "3,4", "--labeller", "other", "--prompt", mine)
        assert (named["labelled"], server.asked[-1][:6]) == (2, "Here: ")
        assert stored(sae, "other")[3].method.startswith("mine@")
        again = label(sae, server, "--features", "3,4", "--labeller", "other", "--relabel")
        assert (again["labelled"], again["already_labelled"]) == (2, 0)
        assert load_labels(labels_file(str(sae), "other")).get(3).method.startswith("label@")
        LabelSet("came", [Label(50, "with it", "came")]).save(sae / "labels" / "came.jsonl")
        assert label(sae, server, "--features", "3,50", "--labeller", "came")["labelled"] == 1
        assert stored(sae, "came").keys() == {3, 50}
        with only_writer(labels_file(str(sae), "other")):
            code, _, err = run(sae, "--base-url", server.url, "--labeller", "other")
        assert (code, "another process" in err) == (1, True)


def test_labels_that_hold_thoughts_or_nothing_are_failures(sae: Path) -> None:
    told = {"w3x": "Okay, let me look at the tokens", "w4x": " \n ", "w5x": "x" * 300}

    def leak(system: str, user: str) -> Any:
        right = explain(system, user)["label"].strip('*"')
        return {"label": told.get(right, right)}

    with LLMServer(leak) as server:
        found = label(sae, server, "--features", "3,4,5,6", code=1)
    assert found["failed"].keys() == {"3", "4"}
    assert found["failed"]["3"] == "the label has the prompt or the model's thoughts in it, 3 times"
    assert len(stored(sae)[5].text) == 120
    assert stored(sae)[6].text == "w6x"


def test_a_batch_asks_the_same_and_gives_the_same_labels(
    sae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, results = tmp_path / "asked.jsonl", tmp_path / "results.jsonl"
    names = ("--model", "served", "--labeller", "batch")
    plan = json.loads(run(sae, *names, "--batch-file", asked, "--json")[1])
    requests = [BatchRequestInput.model_validate_json(x) for x in asked.read_text().splitlines()]
    assert plan["questions"] == len(requests) == len({one.custom_id for one in requests}) > 40
    assert requests[0].body.response_format.json_schema.json_schema["required"] == ["label"]
    with LLMServer(explain) as server:
        direct = label(sae, server)
        bodies = {body["messages"][1]["content"] for body in server.bodies}
    assert bodies == {one.body.messages[1]["content"] for one in requests}
    lines = [batch_output(number, one, explain) for number, one in enumerate(requests)]
    random.Random(0).shuffle(lines)
    results.write_text(
        "\n".join([*lines, batch_output(99, requests[7], explain, custom_id="label-0-1")]) + "\n"
    )
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "jsonschema", None)
        assert "pip install 'neuroscope-vllm[label]'" in run(sae, *names, "--ingest", results)[2]
    code, out, _ = run(
        sae, *names, "--ingest", results, "--json", "--price-in", 1, "--price-out", 1
    )
    found = json.loads(out)
    assert (code, found["labelled"], found["others"]) == (1, len(requests) - 3, 1)
    reasons = sorted(found["failed"].values())
    assert [why.partition(" says")[0] for why in reasons] == [
        "the answer is cut off", "the answer is not JSON", "the batch"
    ]  # fmt: skip
    assert found["spent"]["cost"] == pytest.approx((len(requests) - 1) * 110e-6)
    assert found["labelled"] == direct["labelled"] - 3
    texts = {index: one.text for index, one in stored(sae).items()}
    assert all(texts[i] == one.text for i, one in stored(sae, "batch").items())
    assert run(sae, *names, "--ingest", results, "--json")[0] == 1
    assert len(stored(sae, "batch")) == len(requests) - 3
    mine = tmp_path / "mine.md"
    mine.write_text("Say what it is.\n---\n{examples}\n")
    assert "with this prompt" in run(sae, *names, "--ingest", results, "--prompt", mine)[2]
    results.write_text("{}\n")
    assert "line 1 of" in run(sae, *names, "--ingest", results)[2]


def test_without_a_language_model_tokens_are_the_label(
    sae: Path, tmp_path: Path, tiny_llama: Path, examples: Path
) -> None:
    code, out, _ = run(sae, "--labeller", "tokens", "--features", "3,4,1999", "--json")
    assert (code, json.loads(out)["without"]) == (0, 1)
    assert {i: one.text for i, one in stored(sae, "tokens").items()} == {3: "“w3x”", 4: "“w4x”"}
    assert stored(sae, "tokens")[3].method == "top tokens"

    models.write_saelens_sae(tmp_path / "wide", d_model=64, width=2000, layer=20)
    weights = load_file(tiny_llama / "model.safetensors")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    wanted = next(i for i in range(300, 512) if re.fullmatch(r" ?[a-z]{2,}", tokenizer.decode([i])))
    directions = load_file(tmp_path / "wide" / "sae_weights.safetensors")["W_dec"]
    directions[3] = head[wanted] / weights["model.norm.weight"]
    edit_tensors(tmp_path / "wide" / "sae_weights.safetensors", W_dec=directions)
    folder = home(str(tmp_path / "wide")) / "examples"
    shutil.copytree(examples, folder)
    words = ("--labeller", "tokens", "--model", tiny_llama, "--features", "3")
    code, _, err = run(tmp_path / "wide", *words)
    assert (code, "with other weights than" in err) == (1, True)
    WORDS.write(folder, load_sae(tmp_path / "wide").digest)
    code, _, err = run(tmp_path / "wide", *words)
    assert code == 0, err
    # The corpus has no such token, so it may be noise.
    assert stored(tmp_path / "wide", "tokens")[3].text == "“w3x”"
    token = tokenizer.decode([wanted])
    contexts = pq.read_table(folder / "contexts.parquet")
    texts = pa.array([[token] * 3] * len(contexts), contexts.schema.field("tokens").type)
    changed = contexts.set_column(contexts.schema.get_field_index("tokens"), "tokens", texts)
    pq.write_table(changed, folder / "contexts.parquet")
    (folder.parent / "labels" / "tokens.jsonl").unlink()
    assert run(tmp_path / "wide", *words)[0] == 0
    assert stored(tmp_path / "wide", "tokens")[3].text == f"“w3x” → “{token.strip()}”"
    code, _, err = run(sae, "--labeller", "tokens", "--model", tmp_path, "--features", "3,9")
    assert (code, "give a folder with config.json" in err) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--features", "1,x"], "is no list as in 1,2,3"),
        (["--features", "5000"], "has 2,000 features"),
        (["--prompt", "/nowhere.md"], "can not be read"),
        (["--traffic", "/nowhere"], "can not be read"),
        (["--model", "m", "--ingest", "/nowhere"], "can not be read"),
        (["--model", "m", "--labeller", "../up"], "can not name a file"),
        (["--base-url", "http://127.0.0.1:9/v1"], "start that server"),
        (["--model", "m"], "OPENROUTER_API_KEY is not set"),
        (["--provider", "anthropic"], "needs --model"),
        (["--provider", "anthropic", "--model", "m"], "ANTHROPIC_API_KEY is not set"),
        (["--price-in", "1"], "go together"),
        (["--model", "m", "--base-url", "http://[bad/v1"], "is no address"),
        (["--model", "m", "--base-url", "127.0.0.1:8080"], "is no address"),
        (["--model", "m", "--timeout", "nan"], "no number of seconds"),
        (["--model", "m", "--max-cost", "nan", "--base-url", "http://127.0.0.1:9"], "no amount"),
        (["--dry-run", "--ingest", "x"], "exclude each other"),
        (["--batch-file", "x"], "needs --model"),
    ],
)
def test_what_can_not_be_is_said_in_a_sentence(
    sae: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    code, _, err = run(sae, *words)
    assert code in (1, 2)
    assert said in err


def test_without_examples_it_says_what_to_do(sae: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    code, _, err = run(tmp_path / "bare", "--model", "m")
    assert (code, "gather them with `neuroscope collect`" in err) == (1, True)
