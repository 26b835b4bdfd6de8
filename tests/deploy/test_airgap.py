"""examples/airgap/: what a bundle holds is what we need, and a damaged one is not installed."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.files import AIRGAP, PROJECT

HOST = {"huggingface_hub", "numpy", "pyarrow", "safetensors", "tokenizers", "torch"}
"""Of our own dependencies, those that the host brings: see requirements.txt."""


def pinned() -> dict[str, str]:
    lines = (AIRGAP / "requirements.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_versions_are_what_we_ask_for() -> None:
    pins = pinned()
    vllm = PROJECT["optional-dependencies"]["vllm"]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *vllm]):
        if requirement.name not in HOST:
            assert requirement.specifier.contains(pins[requirement.name]), requirement.name


@pytest.mark.parametrize("fault", ["a byte", "a part"])
def test_a_damaged_bundle_is_not_installed(fault: str, tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    bundle.mkdir()
    parts = {f"wheels.tar.00{i}": bytes([i]) * 1000 for i in range(3)}
    for name, content in parts.items():
        (bundle / name).write_bytes(content)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in parts.items()]
    (bundle / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    (bundle / "MANIFEST").write_text("")
    damaged = bundle / "wheels.tar.001"
    if fault == "a byte":
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    else:
        damaged.unlink()
    words = [AIRGAP / "gpu.sh", bundle, out, "install"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "wheels.tar.001" in done.stdout + done.stderr
    assert not list(out.iterdir())
