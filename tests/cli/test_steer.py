"""`neuroscope steer` against a real server: what it shows is what transformers computes."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import AutoTokenizer

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core import launch
from neuroscope_vllm.core.calibration import NORM_BINS_PER_OCTAVE, NORM_LOG2_MIN, Calibration
from neuroscope_vllm.core.labels import Label, LabelSet
from tests.server.side import start_side
from tests.support.models import write_saelens_sae
from tests.support.served import SMALL, Served, start_neuroscope
from tests.support.steered import SteeredReference

PROMPT = "The quick brown fox jumps over the lazy dog"
LAYER, FEATURE, OTHER = 20, 192, 40  # FEATURE fires on the prompt, and on what follows it
MAXIMUM, MEDIAN_NORM = 20.0, 16.0
COUNT = 12
FLAGS = (*SMALL, "--enforce-eager", "--max-num-batched-tokens", "96")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steer") / "layer_20"
    write_saelens_sae(folder, d_model=64, width=512, layer=LAYER)
    labels = (Label(FEATURE, "foxes and dogs", "someone"), Label(OTHER, "rain", "someone"))
    LabelSet("someone", labels).save(folder / "labels" / "someone.jsonl")
    calibration = Calibration.empty(512)
    calibration.tokens = 1000
    calibration.maximum += MAXIMUM
    middle = (math.log2(MEDIAN_NORM) - NORM_LOG2_MIN) * NORM_BINS_PER_OCTAVE
    calibration.norm_histogram[int(middle)] = 1000
    calibration.save(folder / "calibration.safetensors")
    return folder


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("operator")
    vector = torch.randn(64, generator=torch.Generator().manual_seed(7))
    save_file({"v": vector}, folder / "vector.safetensors")
    (folder / "steering.yaml").write_text(
        f"directions:\n  seven: {{file: vector.safetensors, layer: {LAYER}}}\n"
        f"presets:\n  dry: [{{op: ablate, feature: {OTHER}}}]\n"
    )
    return folder / "steering.yaml", vector


@pytest.fixture(scope="module")
def served(
    tiny_llama: Path,
    sae: Path,
    direction: tuple[Path, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("steer") / "log"
    flags = ("--steering", str(direction[0]))
    server = start_neuroscope(tiny_llama, sae, log, flags=flags, vllm_flags=FLAGS)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def reference(
    tiny_llama: Path, sae: Path, direction: tuple[Path, torch.Tensor]
) -> SteeredReference:
    return SteeredReference(tiny_llama, {LAYER: sae}, {"seven": direction[1]})


@pytest.fixture(scope="module")
def special(tokenizer: Any) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def run(*words: object, url: str, features: str) -> Ran:
    ports = ["--url", url, "--features-url", features]
    done = CliRunner().invoke(main, ["steer", *map(str, words), *ports])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return Ran(done.exit_code, done.stdout, " ".join(done.stderr.replace("│", " ").split()))


def steer(served: Served, *words: object) -> Ran:
    words = (PROMPT, "--max-tokens", COUNT, *words)
    return run(*words, url=served.chat, features=served.features)


def record(served: Served, *words: object) -> dict[str, Any]:
    done = steer(served, *words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def perplexity(reference: SteeredReference, prompt: list[int], answer: list[int]) -> float:
    """As transformers computes it, without steering."""
    logprobs, _ = reference.run([*prompt, *answer], [], 0)
    chosen = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
    return float(chosen.mean().neg().exp())


@torch.no_grad()
def activity(
    reference: SteeredReference,
    prompt: list[int],
    answer: list[int],
    edits: list[dict[str, Any]],
    special: set[int],
) -> dict[str, dict[str, float]]:
    """Of FEATURE in the residuals after the edits; the last token is not run through the model."""
    ids = [*prompt, *answer][:-1]
    _, seen = reference.run(ids, edits, len(prompt))
    values = reference.encode(LAYER, seen[LAYER])[:, FEATURE]
    ordinary = torch.tensor([token not in special for token in ids])
    parts = {"prompt": slice(0, len(prompt)), "generated": slice(len(prompt), None)}
    found = {name: values[part][ordinary[part]] for name, part in parts.items()}
    return {
        name: {"mean": float(f.mean()), "max": float(f.max()), "tokens": len(f)}
        for name, f in found.items()
    }


def test_side_by_side(
    served: Served, reference: SteeredReference, tokenizer: Any, special: set[int]
) -> None:
    found = record(served, "--feature", f"{LAYER}:{FEATURE}", "--value", 30)
    edit = {"op": "add", "layer": LAYER, "feature": FEATURE, "value": 30.0}
    assert found["asked"]["steer"] == [edit]
    messages = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    for name, edits in (("unsteered", []), ("steered", [edit])):
        answer, (feature,) = found[name], found[name]["features"]
        ids = answer["token_ids"]
        assert ids == reference.generate(prompt, edits, len(ids)).ids
        expected = perplexity(reference, prompt, ids)
        assert answer["perplexity"] == pytest.approx(expected, rel=1e-3)
        for phase, wanted in activity(reference, prompt, ids, edits, special).items():
            assert feature[phase]["after"] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert (feature["layer"], feature["index"]) == (LAYER, FEATURE)
        assert feature["label"] == "foxes and dogs"
    plain, steered = found["unsteered"], found["steered"]
    assert plain["features"][0]["generated"]["after"]["mean"] > 0, "so nothing was tested"
    assert plain["features"][0]["prompt"]["before"] == plain["features"][0]["prompt"]["after"]
    # Of the same prompt: what is there before the edit is what is there without one.
    before, was = (one["features"][0]["prompt"]["before"] for one in (steered, plain))
    assert before == pytest.approx(was, rel=1e-3, abs=1e-4)
    assert 0 < steered["perplexity"] != plain["perplexity"]
    same = [a == b for a, b in zip(plain["token_ids"], steered["token_ids"], strict=True)]
    assert steered["parts_at"] == same.index(False)
    assert 0 < steered["changed"] <= 1
    assert (plain["parts_at"], plain["changed"], plain["doses"]) == (None, 0, {})
    assert steered["doses"] == {str(LAYER): pytest.approx(30 / MEDIAN_NORM, rel=0.02)}
    (warning,) = steered["warnings"]
    assert "text often falls apart" in warning


def test_it_is_shown(served: Served) -> None:
    done = steer(served, "--feature", FEATURE, "--value", 30)
    assert done.code == 0, done.err
    shown = " ".join(done.out.split())
    for part in ("add 20:192 30", "unsteered", "[20:192] foxes", "answers part at", "Warning: "):
        assert part in shown


def test_several_edits(served: Served, reference: SteeredReference, tokenizer: Any) -> None:
    extra = {"op": "clamp", "feature": 3, "value": 9, "positions": "generated"}
    words = ["--direction", "seven", "--value", 0.5, "--edit", json.dumps(extra)]
    found = record(served, "--completion", *words, "--preset", "dry")
    prompt = tokenizer.encode(PROMPT)
    edits = [
        {"op": "direction", "layer": LAYER, "direction": "seven", "value": 0.5},
        {**extra, "layer": LAYER},
        {"op": "ablate", "layer": LAYER, "feature": OTHER},
    ]
    ids = found["steered"]["token_ids"]
    assert ids == reference.generate(prompt, edits, len(ids)).ids != found["unsteered"]["token_ids"]
    assert [edit["op"] for edit in found["steered"]["edits"]] == ["direction", "clamp", "ablate"]
    features = {one["index"]: one for one in found["steered"]["features"]}
    assert list(features) == [3, OTHER]
    assert features[3]["prompt"] == {"before": None, "after": None}
    assert features[3]["generated"]["after"]["tokens"] > 0


def test_a_sweep(
    served: Served, reference: SteeredReference, tokenizer: Any, special: set[int]
) -> None:
    words = ["--completion", "--feature", FEATURE, "--unit", "max"]
    found = record(served, *words, "--sweep", "-2,0,0.5,2,9")
    prompt = tokenizer.encode(PROMPT)
    *taken, refused = found["strengths"]
    assert [one["value"] for one in taken] == [-2, 0, 0.5, 2]
    assert (refused["value"], refused["result"]) == (9, None)
    assert "the limit is 4; give smaller values." in refused["refused"]
    for one in taken:
        answer, value = one["result"], one["value"] * MAXIMUM
        edit = {"op": "add", "layer": LAYER, "feature": FEATURE, "value": value}
        ids = answer["token_ids"]
        assert ids == reference.generate(prompt, [edit], len(ids)).ids
        expected = perplexity(reference, prompt, ids)
        assert answer["perplexity"] == pytest.approx(expected, rel=1e-3)
        if value:
            wanted = activity(reference, prompt, ids, [edit], special)["generated"]
            after = answer["features"][0]["generated"]["after"]
            assert after == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    nothing = taken[1]["result"]
    assert (nothing["parts_at"], nothing["changed"]) == (None, 0)
    assert taken[3]["result"]["changed"] > 0


def test_a_sweep_is_shown(served: Served) -> None:
    done = steer(served, "--feature", FEATURE, "--op", "clamp", "--sweep", "0,30,99")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("[20:192] foxes and dogs")
    assert lines[1].split() == ["value", "before", "after", "changed", "perplexity", "distinct"]
    assert [line.split()[0] for line in lines[2:6]] == ["unsteered", "0", "30", "99"]
    assert lines[3].split()[3:5] == ["0", "(0)"]
    assert lines[5].split()[1:] == ["–"] * 5
    assert "the limit is 4" in " ".join(done.out.split())


def test_drawn_answers_share_a_seed(served: Served) -> None:
    def drawn(seed: int) -> dict[str, Any]:
        words = ["--feature", FEATURE, "--value", 0, "--temperature", 2, "--seed", seed]
        return record(served, *words)

    found = drawn(1)
    assert found["asked"]["ask"]["seed"] == 1
    assert found["steered"]["parts_at"] is None
    assert drawn(2)["unsteered"]["token_ids"] != found["unsteered"]["token_ids"]
    assert record(served, "--feature", 1, "--value", 0)["asked"]["ask"]["seed"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--feature", 600, "--value", 1), "steer[0].feature: 600 does not exist"),
        (("--feature", "7:1", "--value", 1), "no SAE of layer 7 is served; there is layer 20."),
        (("--feature", 1, "--sweep", "900,1e3"), "the limit is 4; give smaller values."),
        (("--preset", "dri"), "no preset is named dri; did you mean dry?"),
        (("--direction", "up", "--value", 1), "no direction is named up; there is seven."),
        (("--edit", '{"op": "add", "feature": "x"}'), "at `$.steer[0].feature`"),
        (("--feature", 1, "--value", 1, "--max-tokens", 9999), "max_model_len"),
    ],
)
def test_the_servers_own_words(served: Served, words: tuple[object, ...], said: str) -> None:
    done = steer(served, *words)
    assert (done.code, done.out) == (1, "")
    assert "was refused with 400: " in done.err
    assert said in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "say how to steer"),
        (("--feature", "x", "--value", 1), "--feature x is not [LAYER:]INDEX"),
        (("--feature", 1), "give a strength with --value"),
        (("--feature", 1, "--direction", "a", "--value", 1), "two edits"),
        (("--value", 1, "--preset", "a"), "--value is for --feature or --direction"),
        (("--op", "clamp", "--direction", "a", "--value", 1), "--op is for --feature"),
        (("--feature", 1, "--value", "inf"), "no finite number"),
        (("--feature", 1, "--value", 1, "--temperature", "nan"), "no finite number"),
        (("--feature", 1, "--value", 1, "--sweep", "1"), "give one of them"),
        (("--feature", 1, "--sweep", "1,,2"), "not a list of numbers"),
        (("--feature", 1, "--op", "ablate", "--sweep", "1"), "has no strength"),
        (("--edit", "{"), "is not JSON"),
        (("--edit", "[]"), "no JSON object"),
        (("--preset", "a", "--seed", 1), "needs a --temperature above 0"),
        (("--preset", "a", "--completion", "--system", "b"), "--system is for chats"),
        (("--preset", "a", "--system", "\udcff"), "--system is not text"),
    ],
)
def test_wrong_usage(words: tuple[object, ...], said: str) -> None:
    done = run("Hi", *words, url="http://127.0.0.1:1", features="http://127.0.0.1:1")
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_no_server_there(served: Served) -> None:
    words = (PROMPT, "--feature", 1, "--value", 1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for url, features in ((nowhere, served.features), (served.chat, nowhere)):
            done = run(*words, url=url, features=features)
            assert done.code == 1
            assert f"nobody answers at {nowhere}" in done.err
    done = run(*words, url=served.chat, features="nonsense")
    assert (done.code, done.out) == (1, "")
    done = run(*words, url=served.chat, features=served.chat)
    assert done.code == 1
    assert f"{served.chat} is not a neuroscope server" in done.err


def test_a_server_that_observes_nothing(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.RUNTIME_VARIABLE, "")
    side = start_side(tmp_path)
    try:
        done = run(PROMPT, "--preset", "dry", url=served.chat, features=side.base)
        assert done.code == 1
        assert "does not observe" in done.err
    finally:
        side.process.stop()
