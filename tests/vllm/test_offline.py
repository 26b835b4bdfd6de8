"""`vllm.LLM` with a hub that runs apart: steered as through HTTP, and watched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import Served, bin_path, environment, free_port, start
from tests.support.steered import Generated, SteeredReference, assert_same

PROMPT = "Steering is a matter of taste, and taste is a matter of habit: "
EDITS = [
    {"op": "add", "layer": 20, "feature": 17, "value": 12.0},
    {"op": "ablate", "layer": 20, "feature": 8, "positions": "generated"},
]
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

model, prompt, config, options = map(json.loads, sys.argv[1:])
llm = LLM(model, dtype="float32", max_model_len=1024, enforce_eager=True,
          additional_config={"neuroscope": config})

def asking(**extra):
    return SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1, **extra)

steered = asking(extra_args={"neuroscope": options})
found = []
for answer in llm.generate([prompt, prompt], [steered, asking()]):
    (choice,) = answer.outputs
    ids = list(choice.token_ids)
    logprobs = [by[token].logprob for token, by in zip(ids, choice.logprobs)]
    found.append([answer.request_id, answer.prompt_token_ids, ids, logprobs])
print("FOUND", json.dumps(found))
try:
    asking(extra_args={"neuroscope": {"steer": [{"op": "add", "feature": 9999, "value": 1}]}})
except ValueError as refusal:
    print("REFUSED", refusal)
"""


@pytest.fixture(scope="module")
def hub(tiny_gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, port = tmp_path_factory.mktemp("hub"), free_port()
    address = f"ipc://{folder / 'hub.sock'}"
    words = [bin_path("neuroscope"), "hub", str(tiny_gemma2), "--hub", address]
    served = start([*words, "--features-port", str(port)], folder / "log", 0, port)
    try:
        yield served, address
    finally:
        served.stop()


def test_offline_answers_are_steered_and_seen(
    hub: tuple[Served, str], tiny_gemma2: Path, tiny_sae: Path
) -> None:
    served, address = hub
    config = {"sae": str(tiny_sae), "hub": address}
    given = (str(tiny_gemma2), PROMPT, config, {"steer": EDITS})
    words = [sys.executable, "-c", SCRIPT, *map(json.dumps, given)]
    said = subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    found = [line for line in said.stdout.splitlines() if line.startswith(("FOUND", "REFUSED"))]
    assert len(found) == 2, said.stdout[-2000:] + said.stderr[-2000:]
    assert "steer[0].feature: 9999 does not exist" in found[1]
    reference = SteeredReference(tiny_gemma2, {20: tiny_sae})
    answers = json.loads(found[0].removeprefix("FOUND"))
    for (_, prompt_ids, ids, logprobs), edits in zip(answers, (EDITS, []), strict=True):
        assert_same(Generated(ids, logprobs), reference.generate(prompt_ids, edits, 12))
    assert answers[0][2] != answers[1][2]

    steered, plain = (served.trace(request_id)[0]["events"] for request_id, *_ in answers)
    assert [edit["op"] for edit in steered[0]["steering"]["edits"]] == ["add", "ablate"]
    assert "steering" not in plain[0]
    tokens = [event for event in steered if event["event"] == "token"]
    assert [event["token_id"] for event in tokens] == answers[0][2]
    assert all(event["top_features"] for event in tokens if event["features_at"])
