"""Steered requests through HTTP do what a transformers forward hook does, and nothing to others."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from neuroscope_vllm.cli.main import main
from tests.support import models
from tests.support.malformed import malformed
from tests.support.served import SMALL, Served, start_neuroscope
from tests.support.steered import Generated, SteeredReference, ask, assert_same, generated

PROMPT = "Steering is a matter of taste, and taste is a matter of habit: "
# Prompts arrive in pieces beside running decodes, and share what is in the prefix cache.
FLAGS = (*SMALL, "--enforce-eager", "--max-num-batched-tokens", "48", "--block-size", "16")


@pytest.fixture(scope="module")
def early_sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early") / "layer_5"
    return models.write_saelens_sae(folder, d_model=64, width=256, layer=5, seed=5, gain=0.6)


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("operator")
    vector = torch.randn(64, generator=torch.Generator().manual_seed(7))
    save_file({"v": vector}, folder / "vector.safetensors")
    (folder / "steering.yaml").write_text(
        "directions:\n  seven: {file: vector.safetensors, layer: 5}\n"
        "presets:\n  both: [{op: add, layer: 5, feature: 3, value: 9},"
        " {op: ablate, layer: 20, feature: 8}]\n"
    )
    return folder / "steering.yaml", vector


@pytest.fixture(scope="module")
def served(
    tiny_gemma2: Path,
    tiny_sae: Path,
    early_sae: Path,
    direction: tuple[Path, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    server = start_neuroscope(
        tiny_gemma2,
        tiny_sae,
        tmp_path_factory.mktemp("steering") / "log",
        flags=(
            "--sae",
            str(early_sae),
            "--steering",
            str(direction[0]),
            "--top-k",
            "128",
            "--ranking",
            "activation",
        ),
        vllm_flags=FLAGS,
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def caches() -> bool:
    """Whether the server has a prefix cache."""
    return True


@pytest.fixture(scope="module")
def reference(
    tiny_gemma2: Path, tiny_sae: Path, early_sae: Path, direction: tuple[Path, torch.Tensor]
) -> SteeredReference:
    return SteeredReference(tiny_gemma2, {20: tiny_sae, 5: early_sae}, {"seven": direction[1]})


@pytest.fixture(scope="module")
def plain(served: Served) -> tuple[list[int], Generated]:
    return generated(ask(served, PROMPT))


@pytest.fixture(scope="module")
def firing(reference: SteeredReference, plain: tuple[list[int], Generated]) -> dict[int, list[int]]:
    """By layer, features that are active at the prompt's last token, strongest first."""
    _, seen = reference.run(plain[0], [], 0)
    return {
        layer: reference.encode(layer, rows[-1:])[0].topk(6).indices.tolist()
        for layer, rows in seen.items()
    }


def specifications(firing: dict[int, list[int]]) -> dict[str, list[dict[str, Any]]]:
    early, late = firing[5], firing[20]
    return {
        "add": [{"op": "add", "layer": 20, "feature": 17, "value": 12.0}],
        "clamp": [{"op": "clamp", "layer": 5, "feature": early[0], "value": 15.0}],
        "scale": [{"op": "scale", "layer": 20, "feature": late[1], "value": -4.0}],
        "ablate": [{"op": "ablate", "layer": 5, "feature": f} for f in early[:4]],
        "direction": [{"op": "direction", "layer": 5, "direction": "seven", "value": 0.5}],
        "prompt": [{"op": "add", "layer": 5, "feature": 9, "value": 8.0, "positions": "prompt"}],
        "generated": [
            {"op": "add", "layer": 5, "feature": 9, "value": 8.0, "positions": "generated"}
        ],
        "several": [
            {"op": "add", "layer": 5, "feature": 40, "value": -7.0},
            {"op": "scale", "layer": 5, "feature": early[0], "value": 3.0},
            {"op": "clamp", "layer": 20, "feature": late[0], "value": 1.0, "positions": "prompt"},
            {"op": "add", "layer": 20, "feature": 33, "value": 9.0, "positions": "generated"},
        ],
    }


KINDS = list(specifications({5: [0] * 6, 20: [0] * 6}))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_a_forward_hook_does(
    served: Served,
    reference: SteeredReference,
    plain: tuple[list[int], Generated],
    firing: dict[int, list[int]],
    kind: str,
) -> None:
    edits = specifications(firing)[kind]
    prompt_ids, found = generated(ask(served, PROMPT, {"steer": edits}))
    expected = reference.generate(prompt_ids, edits, 12)
    assert_same(found, expected)
    assert found != plain[1], "the edit has no effect, so nothing was tested"


def test_the_stream_says_what_was_edited(
    served: Served, reference: SteeredReference, firing: dict[int, list[int]]
) -> None:
    edits = specifications(firing)["several"]
    answer = ask(served, PROMPT, {"steer": edits}, request_id="said")
    prompt_ids, found = generated(answer)
    (trace,) = served.trace("cmpl-said")
    steering = trace["events"][0]["steering"]
    assert [(e["op"], e["layer"], e["positions"]) for e in steering["edits"]] == [
        (e["op"], e["layer"], e.get("positions", "all")) for e in edits
    ]
    ids = [*prompt_ids, *found.ids][:-1]
    _, steered = reference.run(ids, edits, len(prompt_ids))
    early = [edit for edit in edits if edit["layer"] == 5]
    _, half = reference.run(ids, early, len(prompt_ids))
    _, plain = reference.run(ids, [], len(prompt_ids))
    before = {5: plain[5], 20: half[20]}
    compared = 0
    for event in trace["events"]:
        layer = event.get("layer")
        if event["event"] not in ("prompt", "token") or event["features_at"] is None:
            continue
        if event.get("cached"):  # by the same edits, an earlier test's
            assert "steered" not in event
            continue
        at = event["position"]
        live = {
            e["feature"]
            for e in edits
            if e["layer"] == layer
            and e.get("positions", "all") != ("generated" if at < len(prompt_ids) else "prompt")
        }
        assert {s["index"] for s in event.get("steered", [])} == live
        for one in event.get("steered", []):
            for name, rows in (("before", before), ("after", steered)):
                expected = reference.encode(layer, rows[layer][at : at + 1])[0, one["index"]]
                assert one[name] == pytest.approx(float(expected), rel=1e-3, abs=2e-3)
                compared += 1
    assert compared > 40


def test_an_ablated_feature_is_not_active_any_more(
    served: Served, firing: dict[int, list[int]]
) -> None:
    """Though the early SAE's encoder reads only six tenths of its own decoder vector."""
    for layer in (5, 20):
        edit = {"op": "ablate", "layer": layer, "feature": firing[layer][0]}
        name = f"ablated-{layer}"
        ask(served, PROMPT, {"steer": [edit]}, request_id=name)
        (trace,) = served.trace(f"cmpl-{name}")
        read = [one for event in trace["events"] for one in event.get("steered", ())]
        assert {one["index"] for one in read} == {edit["feature"]}
        assert max(one["before"] for one in read) > 1
        assert all(one["after"] == 0 for one in read)
        assert not any(
            feature["index"] == edit["feature"]
            for event in trace["events"]
            if event.get("layer") == layer
            for feature in event.get("top_features") or ()
        )


def test_what_the_features_are_is_what_the_layers_above_get(
    served: Served, reference: SteeredReference, firing: dict[int, list[int]]
) -> None:
    """The stream shows the residual after the edit; ablated features are not there any more."""
    edits = specifications(firing)["ablate"]
    prompt_ids, found = generated(ask(served, PROMPT, {"steer": edits}, request_id="shown"))
    _, seen = reference.run([*prompt_ids, *found.ids], edits, len(prompt_ids))
    (trace,) = served.trace("cmpl-shown")
    compared = 0
    for event in trace["events"]:
        if event["event"] in ("prompt", "token") and event["features_at"]:
            rows = reference.encode(event["layer"], seen[event["layer"]]).detach()
            expected = rows[event["position"]]
            for feature in event["top_features"]:
                value = float(expected[feature["index"]])
                assert feature["activation"] == pytest.approx(value, rel=1e-3, abs=2e-3)
                compared += 1
    assert compared > 300


def check_dry_run(
    served: Served, saes: tuple[Path, Path], rules: list[Any], met_at: int, folder: Path
) -> None:
    """The same rules against a trace of a request that had none."""
    generated(ask(served, PROMPT, request_id="unruled"))
    served.trace("cmpl-unruled")
    file = folder / "rules.json"  # which is YAML too
    file.write_text(json.dumps({"rules": rules}))
    flags = [word for sae in saes for word in ("--sae", str(sae))]
    words = ["rules", str(file), "cmpl-unruled", "--url", served.features, "--json", *flags]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    stopping, steering = json.loads(result.stdout)
    assert stopping["stops_at"] == met_at, (rules, result.stdout)
    assert stopping["hits"][0]["position"] == met_at
    assert steering["steered"] == [met_at + 1, met_at + 2]
    assert stopping["tokens"] == 12
    assert 0 < stopping["unknown"] < 12
    torn = folder / "torn.json"
    torn.write_text('{"choices": [{"request_id": "a", "choice": 0, "events": [{}]}]}')
    for wrong, why in (
        (str(file), "holds no trace"),
        (str(torn), "holds no trace"),
        ("cmpl-nobody", "keeps no such request"),
    ):
        result = CliRunner().invoke(main, [*words[:2], wrong, *words[3:]])
        assert (result.exit_code, why in result.output) == (1, True), result.output


def test_a_rule_stops_tags_and_steers(
    served: Served,
    reference: SteeredReference,
    plain: tuple[list[int], Generated],
    tiny_sae: Path,
    early_sae: Path,
    tmp_path: Path,
) -> None:
    saes = (tiny_sae, early_sae)
    prompt_ids, expected = plain
    ids = [*prompt_ids, *expected.ids]
    _, seen = reference.run(ids, [], len(prompt_ids))
    rows = reference.encode(20, seen[20]).detach()[len(prompt_ids) : len(ids) - 1]
    # A feature that is strongest somewhere in the middle of the answer, and reported there.
    at, feature, above = next(
        (int(column.argmax()), index, float(column.topk(2).values.mean()))
        for index, column in enumerate(rows.t())
        if 3 <= int(column.argmax()) <= 7
        and column.topk(2).values.diff() < -0.2
        and index in rows[column.argmax()].topk(100).indices
    )
    when = {"layer": 20, "feature": feature, "above": above}
    stop = {"rules": [{"name": "enough", "when": when, "stop": True, "tag": "seen"}]}
    answer = ask(served, PROMPT, stop, request_id="stopped")
    (choice,) = answer.json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "neuroscope: enough")
    # The step that meets the condition has sampled the next token.
    assert choice["token_ids"] == expected.ids[: at + 2]
    (trace,) = served.trace("cmpl-stopped")
    (hit,) = [e for e in trace["events"] if e["event"] == "rule"]
    assert (hit["position"], hit["feature"]) == (len(prompt_ids) + at, feature)
    assert (hit["rule"], hit["tag"], hit["stop"]) == ("enough", "seen", True)
    assert hit["activation"] == pytest.approx(float(rows[at, feature]), rel=1e-3)
    assert trace["events"][-1]["finish_reason"] == "stop"
    told = [e["token"] for e in trace["events"] if e["event"] == "token" and e["layer"] == 20]
    assert choice["text"] == "".join(told) != ""

    # Edits of a rule act from the next token on, as long as the rule says.
    edit = {"op": "add", "layer": 5, "feature": 9, "value": 8.0}
    steer = {"rules": [{"when": {**when, "last": 2}, "steer": [edit]}]}
    _, found = generated(ask(served, PROMPT, steer, request_id="ruled"))
    check_dry_run(served, saes, [*stop["rules"], *steer["rules"]], len(prompt_ids) + at, tmp_path)
    (trace,) = served.trace("cmpl-ruled")
    edited = [e["position"] for e in trace["events"] if e.get("steered")]
    first = len(prompt_ids) + at
    assert edited[:2] == [first + 1, first + 2]
    assert found.ids[: at + 1] == expected.ids[: at + 1]


def test_who_is_not_steered_is_left_alone(
    served: Served, reference: SteeredReference, firing: dict[int, list[int]]
) -> None:
    """Sixteen at once, half of them steered, each otherwise: all as if they were alone."""
    all_edits = list(specifications(firing).values())
    texts = [f"{number}. {PROMPT}" for number in range(16)]
    options = [{"steer": all_edits[i // 2]} if i % 2 else None for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: generated(ask(served, texts[i], options[i])), range(16)))
    for (prompt_ids, found), given in zip(together, options, strict=True):
        edits = given["steer"] if given else []
        assert_same(found, reference.generate(prompt_ids, edits, 12), 2e-4)


def test_the_prefix_cache_leaks_neither_way(
    served: Served, reference: SteeredReference, firing: dict[int, list[int]]
) -> None:
    text = "A prompt that is long enough to fill several blocks of the prefix cache. " * 3
    edits = specifications(firing)
    order = ["add", None, "add", None, "generated", "prompt", "generated", None, "clamp"]
    expected: dict[str | None, Generated] = {}
    cached: dict[str | None, list[int]] = {}
    for kind in order:
        options = {"steer": edits[kind]} if kind else None
        answer = ask(served, text, options)
        prompt_ids, found = generated(answer)
        if kind not in expected:
            expected[kind] = reference.generate(prompt_ids, edits[kind] if kind else [], 12)
        assert_same(found, expected[kind])
        name = answer.json()["id"]
        (trace,) = served.trace(name)
        cached.setdefault(kind, []).append(trace["events"][-1]["cached_tokens"])
    # Who steers alike shares; from the first generated token on, the prompt is everybody's.
    assert cached["add"][0] == 0
    assert cached["add"][1] > 0
    assert cached[None][0] == 0
    assert cached[None][1] > 0
    assert cached["generated"][0] > 0
    assert cached["prompt"] == cached["clamp"] == [0]


def test_presets_are_the_operators(served: Served, reference: SteeredReference) -> None:
    prompt_ids, found = generated(ask(served, PROMPT, {"preset": "both"}))
    edits = [
        {"op": "add", "layer": 5, "feature": 3, "value": 9},
        {"op": "ablate", "layer": 20, "feature": 8},
    ]
    assert_same(found, reference.generate(prompt_ids, edits, 12))


def steer(served: Served, name: str, body: Any) -> httpx.Response:
    url = f"{served.features}/v1/requests/{name}/steering"
    if body is None:
        return httpx.delete(url, timeout=30)
    return httpx.put(url, content=body if isinstance(body, str) else json.dumps(body), timeout=30)


def test_a_running_request_is_steered_otherwise(
    served: Served,
    reference: SteeredReference,
    direction: tuple[Path, torch.Tensor],
    caches: bool,
) -> None:
    edit = {"op": "add", "layer": 5, "feature": 9, "value": 9.0, "positions": "generated"}
    prompt = [7 * i % 300 + 5 for i in range(60)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, served, prompt, count=900, request_id="turned")
        deadline = time.monotonic() + 60
        while '"token_index":0' not in httpx.get(f"{served.features}/v1/requests/cmpl-turned").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = steer(served, "cmpl-turned", {"steer": [edit]})
        assert answer.status_code == 200, answer.text
        refused = steer(served, "cmpl-turned", {"steer": [{**edit, "feature": 512}]})
        # The operator's file is that of the start, here as for requests that come.
        was = direction[0].read_text()
        direction[0].write_text(was.replace("seven:", "eight: &v {file: vector.safetensors,"
                                            " layer: 5}\n  seven:"))  # fmt: skip
        later = {"op": "direction", "direction": "eight", "value": 0.1}
        unknown = steer(served, "cmpl-turned", {"steer": [later]})
        direction[0].write_text(was)
        stopped = steer(served, "cmpl-turned", None)
        _, found = generated(running.result(120))
    (changed,) = answer.json()["choices"]
    assert changed["steering"]["edits"][0]["value"] == 9.0
    assert (refused.status_code, "steer[0].feature" in refused.text) == (400, True)
    assert (unknown.status_code, "steer[0].direction" in unknown.text) == (400, True)
    first, end = changed["position"], stopped.json()["choices"][0]["position"]
    assert stopped.json()["choices"][0]["steering"] is None
    assert len(prompt) < first < end < len(prompt) + 900
    (trace,) = served.trace("cmpl-turned")
    told = [e for e in trace["events"] if e["event"] == "steering"]
    assert [(e["position"], bool(e["steering"])) for e in told] == [(first, True), (end, False)]
    edited = [e["position"] for e in trace["events"] if e.get("steered")]
    assert edited == list(range(first, end))

    # What a hook does that begins and ends there. The first token after the change is the first
    # that the edit could alter.
    ids = [*prompt, *found.ids]
    logprobs, _ = reference.run(ids, [{**edit, "until": end}], first)
    chosen = [float(logprobs[at - 1, ids[at]]) for at in range(len(prompt), len(ids))]
    assert found.logprobs == pytest.approx(chosen, rel=1e-3, abs=1e-3)

    # Neither who asks for all of that text unsteered nor the readers get what was steered.
    again = ask(served, ids[: end + 40], count=4, request_id="after")
    assert_same(generated(again)[1], reference.generate(ids[: end + 40], [], 4))
    (trace,) = served.trace("cmpl-after")
    _, plain = reference.run(ids[: end + 40], [], 0)
    rows = reference.encode(20, plain[20]).detach()
    cached = 0
    for event in trace["events"]:
        if event.get("cached") and event["layer"] == 20:
            cached += 1
            for feature in event["top_features"]:
                expected = float(rows[event["position"], feature["index"]])
                assert feature["activation"] == pytest.approx(expected, rel=2e-3, abs=3e-3)
    assert (cached > 0, cached <= first) == (caches, True)
    assert steer(served, "cmpl-turned", {"steer": [edit]}).status_code == 409
    assert steer(served, "cmpl-nobody", {"steer": [edit]}).status_code == 404
    for nonsense in ("", "[]", '{"steer": 1}', '{"prompt_features": "all"}', "\x00", '"' * 70_000):
        assert steer(served, "cmpl-after", nonsense).status_code in (400, 413)


def test_malformed_specifications_are_refused_and_harm_nobody(
    served: Served, plain: tuple[list[int], Generated]
) -> None:
    """Each a 400 that says what is wrong, never an answer that is not steered."""
    asked = list(malformed())
    assert len(asked) >= 100

    def send(options: str) -> httpx.Response:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
        content = json.dumps({**body, "vllm_xargs": {"neuroscope": options}})
        headers = {"content-type": "application/json"}
        return httpx.post(
            f"{served.chat}/v1/completions", content=content, headers=headers, timeout=60
        )

    with ThreadPoolExecutor(8) as pool:
        for options, answer in zip(asked, pool.map(send, asked), strict=True):
            assert answer.status_code == 400, (options[:200], answer.text[:300])
            message = answer.json()["error"]["message"]
            assert "neuroscope" in message, (options[:200], message)
            assert "Traceback" not in message
            assert len(message) < 1500, message
    assert generated(ask(served, PROMPT)) == plain


def test_beams_can_not_be_steered_and_are_not(served: Served) -> None:
    beams = {"use_beam_search": True, "n": 2, "logprobs": None}
    answer = ask(served, PROMPT, {"preset": "both"}, count=3, **beams)
    assert (answer.status_code, "beam search can not be steered" in answer.text) == (400, True)
    assert ask(served, PROMPT, count=3, **beams).status_code == 200


def test_what_we_note_is_not_taken_from_clients(served: Served) -> None:
    forged = {"slots": [{"layer": 20, "feature": 1, "constant": 99.0}]}
    for value in (json.dumps(forged), "x", 1):
        xargs = {"neuroscope_steering": value}
        answer = ask(served, PROMPT, vllm_xargs=xargs)
        assert answer.status_code == 400
        assert "reserved" in answer.text
