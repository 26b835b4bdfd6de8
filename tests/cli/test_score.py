"""`neuroscope score` against a real HTTP server whose judge knows what each feature is."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from click.testing import CliRunner
from delphi.log.result_analysis import (  # pyright: ignore[reportMissingImports]
    compute_classification_metrics,
    compute_confusion,
)

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import DATA_VARIABLE, home, labels_file, scores_file
from neuroscope_vllm.core.autointerp.judgements import Judgement, read_judgements
from neuroscope_vllm.core.labels import Label, LabelSet, load_labels
from tests.support.llm_server import Fault, LLMServer
from tests.support.word_features import WordFeatures

RIGHT, WRONG, BROAD = [5, 10, 20, 30], [6, 11, 21], [1001, 1002]
RARE = 55
TEXT_LINE = re.compile(r"Text (\d+): (.*)")


def label_of(feature: int) -> str:
    """Of WRONG it names another word; of BROAD, the twins, all places of their word."""
    about = feature + 7 if feature in WRONG else feature % 1000
    return f"the word w{about}x"


def judge(system: str, user: str) -> dict[str, int]:
    """Goes by the label alone."""
    wanted = re.match(r"Label: the word (\w+)", user)
    assert wanted is not None
    found = {}
    for number, text in TEXT_LINE.findall(user):
        marked = re.findall(r"<<(.*?)>>", text)
        words = " ".join(marked).split() if "marked tokens" in system else text.split()
        every = all if "marked tokens" in system else any
        found[f"text_{number}"] = int(every(w == wanted[1] for w in words))
    return found


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "examples"
    WordFeatures().write(folder)
    return folder


@pytest.fixture
def sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: Path) -> str:
    """An SAE whose examples are there, and labels of `gpt`."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    source = tmp_path / "sae"
    source.mkdir()
    home(str(source)).mkdir(parents=True)
    (home(str(source)) / "examples").symlink_to(examples)
    made = {"method": "by hand", "model": "gpt-5", "created": "2026-01-02", "examples": 20}
    labels = (Label(i, label_of(i), "gpt", **made) for i in (*RIGHT, *WRONG, *BROAD, RARE))
    LabelSet("gpt", labels).save(labels_file(str(source), "gpt"))
    return str(source)


@pytest.fixture
def server() -> Iterator[LLMServer]:
    with LLMServer(judge) as server:
        yield server


def run(sae: str, server: LLMServer | None, *words: str, code: int = 0) -> tuple[str, str]:
    where = ["--base-url", server.url] if server else []
    given = ["score", "--sae", sae, "--labeller", "gpt", *where, *words]
    result = CliRunner().invoke(main, given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    assert result.exit_code == code, result.stderr
    return result.stdout, " ".join(result.stderr.split())


def report(sae: str, server: LLMServer, *words: str, code: int = 0) -> dict[str, Any]:
    return json.loads(run(sae, server, "--json", *words, code=code)[0])


def stored(sae: str) -> dict[int, Label]:
    return {label.index: label for label in load_labels(labels_file(sae, "gpt"))}


def test_right_labels_score_high_wrong_ones_low_and_broad_ones_between(
    sae: str, server: LLMServer
) -> None:
    found = report(sae, server)
    scores = {one["index"]: one["score"] for one in found["features"]}
    assert all(scores[index] == 1.0 for index in RIGHT)
    assert all(scores[index] <= 0.6 for index in WRONG)
    detected = {one["index"]: one["detection"] for one in found["features"]}
    for index in BROAD:  # the ten hard negatives, in which the word is and the feature is not
        assert detected[index]["recall"] == 1.0
        assert detected[index]["false_positives"] >= 10
        assert 0.6 <= detected[index]["balanced"] <= 0.75
    assert found["too_few_texts"] == [RARE]
    assert (found["scored"], found["unreliable"]) == (9, 3)
    assert (found["failed"], found["stopped"]) == ({}, None)
    label = stored(sae)[20]
    assert (label.score, label.detection, label.fuzzing, label.scorer) == (1, 1, 1, "scripted")
    assert (label.positives, label.negatives) == (20, 20)
    assert (label.text, label.method, label.model, label.examples) == (
        *("the word w20x", "by hand", "gpt-5", 20),
    )
    assert re.fullmatch(
        r"detection@[0-9a-f]{12}:[0-9a-f]{8} fuzzing@[0-9a-f]{12}:\w{8}", label.scoring or ""
    )
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", label.scored_on or "")
    assert stored(sae)[RARE].score is None


def test_delphi_computes_the_same_from_the_answers_that_are_kept(
    sae: str, server: LLMServer
) -> None:
    server.answer = lambda system, user: {
        name: answer ^ (hash((user, name)) % 4 == 0) for name, answer in judge(system, user).items()
    }
    found = {one["index"]: one for one in report(sae, server)["features"]}
    lines = pandas.read_json(scores_file(sae, "gpt"), lines=True)
    lines = lines.explode(["texts", "hard", "truth", "answer"])
    lines = lines.rename(columns={"truth": "activating", "answer": "prediction"})
    labels = stored(sae)
    assert len(lines) == 9 * 2 * 40
    for (index, kind), group in lines.groupby(["feature", "kind"]):
        theirs = compute_classification_metrics(compute_confusion(group))
        ours = found[index][kind]
        for name, other in (("f1", "f1_score"), ("precision", "precision"), ("recall", "recall")):
            assert ours[name] == theirs[other]
        assert ours["balanced"] == theirs["accuracy"] == getattr(labels[index], kind)
    assert len({one["detection"]["balanced"] for one in found.values()}) > 3


def test_faults_change_no_score_and_no_answer_is_kept_twice(sae: str, server: LLMServer) -> None:
    expected = {one["index"]: one["score"] for one in report(sae, server)["features"]}
    lines = scores_file(sae, "gpt").read_bytes()
    kinds = ["429:0.05", "500", "truncated", "prose", "schema", "empty", "drop", "wrapped", None]
    order = random.Random(5)
    fault: Fault = lambda number, user: order.choice(kinds) if number % 4 == 0 else None  # noqa: E731
    with LLMServer(judge, fault=fault) as shaky:
        words = ["--rescore", "--concurrency", "4"]
        first = CliRunner().invoke(
            main,
            ["score", "--sae", sae, "--labeller", "gpt", "--base-url", shaky.url, "--json", *words],
        )
        found = json.loads(first.stdout)
        assert first.exit_code == (1 if found["failed"] else 0)
        shaky.fault = lambda number, user: None
        again = report(sae, shaky)
    assert {int(i) for i in found["failed"]} == {one["index"] for one in again["features"]}
    both = {one["index"]: one["score"] for one in [*found["features"], *again["features"]]}
    assert both == expected
    kept = scores_file(sae, "gpt").read_bytes()
    assert sorted(kept.splitlines()) == sorted(lines.splitlines())
    assert [old.read_bytes() for old in scores_file(sae, "gpt").parent.glob("*.old")] == [lines]


def test_a_run_that_is_killed_goes_on_where_it_was(sae: str, tmp_path: Path) -> None:
    with LLMServer(judge) as server:
        expected = report(sae, server)["scored"]
        whole = stored(sae)
        answers = sorted(scores_file(sae, "gpt").read_bytes().splitlines())
        labels_file(sae, "gpt").write_bytes(
            b"".join(LabelSet("gpt", [plain(label)]).to_jsonl() for label in whole.values())
        )
        scores_file(sae, "gpt").unlink()
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "score", "--sae", sae]
    words += ["--labeller", "gpt", "--concurrency", "2", "--base-url"]
    draw = random.Random(11)
    with LLMServer(judge, latency=0.02) as server:
        for signal_ in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
            before = len(server.asked)
            process = subprocess.Popen(
                [*words, server.url],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Who runs tests in the background has them ignore it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
            until = before + draw.randint(8, 32)
            deadline = time.monotonic() + 60
            while len(server.asked) < until and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal_)
            code = process.wait(20)
            assert code == (130 if signal_ == signal.SIGINT else -9)
            for path in (scores_file(sae, "gpt"), labels_file(sae, "gpt")):
                cut_off(path)
        assert len(stored(sae)) == 10
        last = report(sae, server)
    assert last["scored"] + last["already_scored"] == expected
    assert stored(sae) == whole
    assert sorted(scores_file(sae, "gpt").read_bytes().splitlines()) == answers
    # Asked again is only what was under way when it was killed: 2 at most.
    assert len(server.asked) - len(set(server.asked)) <= 4 * 2


def plain(label: Label) -> Label:
    """Without its score."""
    return Label(label.index, label.text, "gpt", None, *(
        getattr(label, name) for name in ("method", "model", "created", "examples")
    ))  # fmt: skip


def cut_off(path: Path) -> None:
    """As if the kill had come in the middle of a line."""
    with path.open("ab") as file:
        file.write(b'{"feature":5,"kin')


def test_what_is_scored_is_asked_no_more_until_something_changed(
    sae: str, server: LLMServer, tmp_path: Path
) -> None:
    some = ("--features", "5,6,10")
    assert report(sae, server, *some, "--method", "detection")["scored"] == 3
    one = stored(sae)[6]
    assert (one.score, one.fuzzing) == (one.detection, None)
    asked = len(server.asked)
    assert asked == 3 * 8
    both = report(sae, server, *some)  # fuzzing is missing
    assert (len(server.asked) - asked, both["scored"], both["already_scored"]) == (24, 3, 0)
    assert "detection" not in both["features"][0]
    two = stored(sae)[6]
    assert two.detection == one.detection
    assert two.score == (one.detection + two.fuzzing) / 2  # pyright: ignore[reportOperatorIssue]
    asked = len(server.asked)
    nothing = report(sae, server, *some)
    assert (nothing["scored"], nothing["already_scored"]) == (0, 3)
    assert len(server.asked) == asked
    # Another label of the same feature has no score.
    with labels_file(sae, "gpt").open("ab") as file:
        file.write(b'{"index":6,"text":"the word w6x","labeller":"gpt"}\n')
    changed = report(sae, server, *some)
    assert [(f["index"], f["score"]) for f in changed["features"]] == [(6, 1.0)]
    asked = len(server.asked)
    mine = tmp_path / "mine.md"
    mine.write_text("You judge.\n---\nLabel: {label}\n{texts}")
    prompted = report(sae, server, *some, "--method", "detection", "--prompt", str(mine))
    assert (prompted["scored"], len(server.asked) - asked) == (3, 24)
    assert server.bodies[-1]["messages"][0]["content"] == "You judge."
    asked = len(server.asked)
    assert report(sae, server, *some, "--rescore", "--limit", "2")["scored"] == 2
    assert len(server.asked) - asked == 32
    kept = read_judgements(scores_file(sae, "gpt"))
    assert len(scores_file(sae, "gpt").read_bytes().splitlines()) == len(kept) == 48
    assert {k.label for k in kept.values()} == {label.text for label in stored(sae).values()} & {
        f"the word w{n}x" for n in (5, 6, 10)
    }
    assert all(isinstance(one, Judgement) and len(one.answer) == 5 for one in kept.values())


def test_an_unreliable_label_is_marked_wherever_labels_are_listed(
    sae: str, server: LLMServer
) -> None:
    run(sae, server)
    call = CliRunner().invoke
    listed = call(main, ["labels", "list", "--sae", sae]).stdout.splitlines()[1].split()
    assert listed[:4] == ["gpt", "10", "9", "3"]
    found = call(main, ["labels", "search", "w13x", "--sae", sae])
    assert "unreliable" in found.stdout
    assert "unreliable" not in call(main, ["labels", "search", "w20x", "--sae", sae]).stdout
    shown = json.loads(call(main, ["labels", "show", "6", "20", "--json", "--sae", sae]).stdout)
    assert [one["unreliable"] for one in shown["labels"]] == [True, False]


def test_labels_that_ship_with_an_sae_are_scored_in_a_copy(sae: str, server: LLMServer) -> None:
    shipped = Path(sae) / "labels" / "gpt.jsonl"
    labels_file(sae, "gpt").rename(shipped.parent.parent / "moved")
    shipped.parent.mkdir()
    (Path(sae) / "moved").rename(shipped)
    before = shipped.read_bytes()
    assert report(sae, server, "--features", "5")["scored"] == 1
    assert shipped.read_bytes() == before
    assert (stored(sae)[5].score, len(stored(sae))) == (1.0, 10)


def test_a_dry_run_asks_and_keeps_nothing(sae: str, server: LLMServer) -> None:
    before = labels_file(sae, "gpt").read_bytes()
    found = report(sae, server, "--dry-run")
    assert (found["to_score"], found["questions"], found["too_few_texts"]) == (9, 144, [RARE])
    out, _ = run(sae, server, "--dry-run")
    assert "9 labels to score" in out
    assert "144 questions to scripted" in out
    assert server.asked == []
    assert not scores_file(sae, "gpt").exists()
    assert labels_file(sae, "gpt").read_bytes() == before
    real = report(sae, server)["spent"]
    assert found["prompt_tokens"] == pytest.approx(real["prompt_tokens"], rel=0.6)
    assert found["cost"] == pytest.approx(real["cost"], rel=0.6)


def test_the_cost_stays_below_its_bound_and_what_was_paid_for_is_kept(
    sae: str, server: LLMServer
) -> None:
    found = report(sae, server, "--max-cost", "0.06", code=1)
    assert 0 < server.billed <= 0.06
    assert "could pass --max-cost 0.06" in found["stopped"]
    assert 0 < found["scored"] < 9
    asked = len(server.asked)
    assert len(read_judgements(scores_file(sae, "gpt"))) == len(server.answered) == asked
    rest = report(sae, server)
    assert rest["scored"] + found["scored"] == 9
    assert len(server.asked) == 144


def test_what_failed_is_named_and_asked_again_alone(sae: str, server: LLMServer) -> None:
    server.fault = lambda number, user: "prose" if "w20x" in user.splitlines()[0] else None
    out, err = run(sae, server, code=1)
    assert "8 labels scored" in out
    assert "feature 20 failed: the answer is not JSON, 3 times" in err
    server.fault = lambda number, user: None
    asked = len(server.asked)
    assert report(sae, server)["scored"] == 1
    assert len(server.asked) - asked == 16


def test_two_runs_at_once_are_refused(sae: str, server: LLMServer) -> None:
    from neuroscope_vllm.core.artefacts import only_writer

    with only_writer(labels_file(sae, "gpt")):
        assert "another process is making" in run(sae, server, code=1)[1]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--features", "5,9"), 1, "feature 9 has no label of 'gpt'"),
        (("--features", "a"), 2, "--features a is no list"),
        (("--sae", "no/such"), 1, "SAE no/such does not exist"),
        (("--sae", "gemma-scope"), 2, "name the SAE by its address"),
        (("--labeller", "nobody"), 1, "no labels of 'nobody'"),
        (("--prompt", "none.md"), 2, "--prompt is for one method"),
        (("--prompt", "none.md", "--method", "fuzzing"), 1, "prompt none.md can not be read"),
        (("--max-cost", "1"), 1, "price of scripted is not known"),
        (("--positives", "2"), 2, "not in the range"),
    ],
)
def test_mistakes_are_explained(sae: str, words: tuple[str, ...], code: int, says: str) -> None:
    with LLMServer(judge, prices=False) as server:
        assert says in run(sae, server, *words, code=code)[1]
        assert server.asked == []


def test_without_examples_it_says_how_to_get_some(sae: str, server: LLMServer) -> None:
    (home(sae) / "examples").unlink()
    assert "gather them with `neuroscope collect`" in run(sae, server, code=1)[1]


def test_a_damaged_file_of_answers_is_no_traceback(sae: str, server: LLMServer) -> None:
    scores_file(sae, "gpt").parent.mkdir(parents=True)
    scores_file(sae, "gpt").write_text('{"feature": 1}\nx\n')
    assert "line 1 of" in run(sae, server, code=1)[1]
    assert os.path.getsize(scores_file(sae, "gpt")) == 17
