"""`neuroscope label` asks the demo model that vLLM serves, and its batches are vLLM's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.demo import NAME, demo_model
from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import home, labels_file
from neuroscope_vllm.core.labels import load_labels
from tests.support.served import Served, start_vllm
from tests.support.word_features import WordFeatures

FLAGS = ("--served-model-name", NAME, "--max-model-len", "4096", "--enforce-eager")
PROMPT = """You name what marked words have in common.
---
{examples}

Answer with JSON, as in {"label": "names of animals"}.
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = start_vllm(
        demo_model(), tmp_path_factory.mktemp("label") / "vllm.log", vllm_flags=FLAGS
    )
    try:
        yield server.wait_ready(f"{server.chat}/v1/models")
    finally:
        server.stop()


def test_the_served_model_labels_features(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROSCOPE_DATA", str(tmp_path / "data"))
    sae, prompt, asked = tmp_path / "sae", tmp_path / "short.md", tmp_path / "asked.jsonl"
    sae.mkdir()
    prompt.write_text(PROMPT)
    WordFeatures(words=30, sequences=12).write(home(str(sae)) / "examples")
    common = ["label", "--sae", str(sae), "--prompt", str(prompt), "--limit", "6", "--json"]
    common += ["--min-examples", "2"]

    done = CliRunner().invoke(main, [*common, "--base-url", f"{server.chat}/v1"])
    found = json.loads(done.stdout)
    assert found["labelled"] + len(found["failed"]) == 6, done.stderr
    assert found["labelled"] >= 4  # it is small, and may not know when to stop
    assert "does not take a JSON schema" not in done.stderr
    assert (found["model"], found["spent"]["cost"]) == (NAME, None)
    assert found["spent"]["prompt_tokens"] > 1000
    labels = load_labels(labels_file(str(sae), NAME))
    assert len(labels) == found["labelled"]
    assert all(label.model == NAME and label.text for label in labels)

    batch = [*common, "--model", NAME, "--labeller", "batch"]
    assert CliRunner().invoke(main, [*batch, "--batch-file", str(asked)]).exit_code == 0
    lines = [json.loads(line) for line in asked.read_text().splitlines()]
    assert len(lines) == 6
    results = tmp_path / "results.jsonl"
    with results.open("w") as file:  # as `vllm run-batch` does, whose start takes a minute
        for line in lines:
            answer = httpx.post(f"{server.chat}{line['url']}", json=line["body"], timeout=120)
            response = {"status_code": answer.status_code, "body": answer.json()}
            result = {"custom_id": line["custom_id"], "response": response, "error": None}
            file.write(json.dumps(result) + "\n")
    done = CliRunner().invoke(main, [*batch, "--ingest", str(results)])
    assert json.loads(done.stdout)["labelled"] >= 4, done.stderr
