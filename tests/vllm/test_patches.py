"""vLLM with our source patch gives the features that the plugin gives without it, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from safetensors.torch import load_file

from tests.support.served import V2_ON_CPU, environment
from tests.support.vllm_copy import copy_vllm, patch_vllm

MINOR = ".".join(map(str, vllm.__version_tuple__[:2]))
# Chunked prefill, and requests that end in different steps.
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "32"]
SEQUENCES = [[(7 * i * i + k) % 400 + 5 for i in range(n)] for k, n in enumerate((50, 3, 21))]
SCRIPT = """
import json, pathlib, sys
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.passes import FeaturePass
from neuroscope_vllm.engine.vllm.engine import VLLMEngine

model, sae, flags, sequences, out = map(json.loads, sys.argv[1:])
engine = VLLMEngine(model, Settings(sae=[sae]), vllm_flags=flags)
pathlib.Path(out).write_bytes(engine.run(FeaturePass(), sequences)[20])

def seams(worker):
    runner = worker.model_runner
    decoder = type(runner.get_model().model).__module__
    wrapped = [name for name in ("prepare_inputs", "_prepare_inputs") if name in vars(runner)]
    return decoder, wrapped

(found,) = engine._llm.collective_rpc(seams)
print("SEAMS", json.dumps(found))
"""


def features(
    model: Path, sae: Path, out: Path, env: dict[str, str]
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """All features of SEQUENCES, and which seams of vLLM they came through."""
    given = map(json.dumps, (str(model), str(sae), FLAGS, SEQUENCES, str(out)))
    words = [sys.executable, "-c", SCRIPT, *given]
    env = environment(env)
    said = subprocess.run(words, env=env, capture_output=True, text=True, timeout=400, check=False)
    seams = [line for line in said.stdout.splitlines() if line.startswith("SEAMS")]
    assert seams, (said.stdout + said.stderr)[-4000:]
    return load_file(out), json.loads(seams[0].removeprefix("SEAMS"))


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_vllm(tmp_path_factory.mktemp("patched"))
    patch_vllm(folder, MINOR)
    return folder


@pytest.fixture(scope="module")
def plain(
    tiny_gemma2: Path, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    found, seams = features(tiny_gemma2, tiny_sae, tmp_path_factory.mktemp("plain") / "out", {})
    assert seams == ["neuroscope_vllm.engine.vllm.models.gemma2", ["_prepare_inputs"]]
    assert len(found["activation"]) > len(found["token_id"]) == sum(map(len, SEQUENCES))
    return found


def test_patched_vllm_gives_the_same_features(
    tiny_gemma2: Path, tiny_sae: Path, plain: dict[str, torch.Tensor], patched: Path, tmp_path: Path
) -> None:
    env = {"PYTHONPATH": str(patched)}
    native, seams = features(tiny_gemma2, tiny_sae, tmp_path / "out", env)
    assert seams == ["vllm.model_executor.models.gemma2", []]
    assert native.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(native[name], tensor), name


def test_patched_v2_runner(
    tiny_gemma2: Path, tiny_sae: Path, plain: dict[str, torch.Tensor], patched: Path, tmp_path: Path
) -> None:
    """Against V1, whose attention rounds otherwise."""
    env = {**V2_ON_CPU, "PYTHONPATH": f"{patched}:{V2_ON_CPU['PYTHONPATH']}"}
    native, seams = features(tiny_gemma2, tiny_sae, tmp_path / "out", env)
    assert seams == ["vllm.model_executor.models.gemma2", []]
    for name in ("sequence", "position", "token_id", "start", "feature"):
        assert torch.equal(native[name], plain[name]), name
    for name in ("norm", "activation"):
        torch.testing.assert_close(native[name], plain[name], rtol=1e-3, atol=1e-3)
