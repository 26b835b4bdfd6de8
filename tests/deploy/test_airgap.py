"""examples/airgap/: what a bundle holds is what we need, and a damaged one is not installed."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.files import AIRGAP, PROJECT, ROOT

HOST = {
    "huggingface_hub",
    "numpy",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "typing_extensions",
}
"""Of what is imported, those that the host brings: see requirements.txt, and what these need."""


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


def imported(file: Path, seen: set[Path]) -> Iterator[str]:
    """Top-level packages that a file needs to be imported, also by way of others in tests/."""
    if file in seen or not file.exists():
        return
    seen.add(file)
    for node in ast.parse(file.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("tests."):
                yield from imported(ROOT.joinpath(*name.split(".")).with_suffix(".py"), seen)
            else:
                yield name.partition(".")[0]


def required(distribution: str) -> Iterator[str]:
    """It, and what it needs beside the host's."""
    yield distribution
    for requirement in map(Requirement, metadata.requires(distribution) or []):
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and requirement.name.replace("-", "_") not in HOST:
            yield from required(requirement.name)


def test_what_the_tests_import_is_there() -> None:
    seen: set[Path] = set()
    tests = [ROOT / "tests" / "conftest.py", *(ROOT / "tests" / "gpu").glob("*.py")]
    found = {name for file in tests for name in imported(file, seen)}
    ours = {"neuroscope_vllm", "vllm", *sys.stdlib_module_names}
    providers = metadata.packages_distributions()
    needed = {one for name in found - ours - HOST for one in required(providers[name][0])}
    assert {"pytest-xdist", "execnet", "hypothesis"} <= needed
    pins = {canonicalize_name(name) for name in pinned()}
    assert {canonicalize_name(name) for name in needed} <= pins


def write_bundle(folder: Path, parts: dict[str, bytes], manifest: str) -> None:
    folder.mkdir()
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in parts.items()]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    (folder / "MANIFEST").write_text(manifest)


def test_a_python_without_torch_is_told_of_before_anything_is_installed(tmp_path: Path) -> None:
    bundle, out, wheel = tmp_path / "bundle", tmp_path / "out", b"a wheel"
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w") as tar:
        member = tarfile.TarInfo("one.whl")
        member.size = len(wheel)
        tar.addfile(member, io.BytesIO(wheel))
    manifest = f"{hashlib.sha256(wheel).hexdigest()}  one.whl\n"
    write_bundle(bundle, {"wheels.tar.000": packed.getvalue()}, manifest)
    python = tmp_path / "python"  # whatever it is asked for, its venv sees nothing beside itself
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -m venv --without-pip "$4"\n')
    python.chmod(0o755)
    words = [AIRGAP / "gpu.sh", bundle, out, "install"]
    env = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert "does not see torch, triton and transformers" in done.stderr
    assert not (out / "venv").exists()


@pytest.mark.parametrize("fault", ["a byte", "a part"])
def test_a_damaged_bundle_is_not_installed(fault: str, tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    write_bundle(bundle, {f"wheels.tar.00{i}": bytes([i]) * 1000 for i in range(3)}, "")
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
