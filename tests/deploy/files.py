"""Dockerfiles, Compose files and what they run, read as their tools read them."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import podman_compose
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
COMPOSE = {"one host": DOCKER / "compose.yaml", "ray": DOCKER / "ray" / "compose.yaml"}
AIRGAP = ROOT / "examples" / "airgap"
SCRIPTS = [
    *sorted(AIRGAP.glob("*.sh")),
    *sorted((ROOT / "examples").glob("*.sh")),
    ROOT / "tests" / "run.sh",
    ROOT / ".ci" / "run",
]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(file: Path) -> list[str]:
    """Variables without which Compose refuses the file."""
    return sorted(set(re.findall(r"\$\{(\w+):\?", file.read_text())))


def values(file: Path) -> dict[str, Any]:
    given = {name: f"some-{name.lower()}" for name in required(file)}
    return given | {"HEAD_IP": "10.0.0.1", "HOST_IP": "10.0.0.1", "SAE": "some-sae"}


def interpolated(file: Path, variables: dict[str, Any]) -> dict[str, Any]:
    return podman_compose.rec_subs(yaml.safe_load(file.read_text()), variables)


def services(file: Path) -> dict[str, dict[str, Any]]:
    return interpolated(file, values(file))["services"]


def sources(file: Path) -> list[Path]:
    """Files and folders of this checkout that a Compose file names."""
    found = []
    for service in services(file).values():
        if "build" in service:
            context = file.parent / service["build"]["context"]
            found.append(context / service["build"]["dockerfile"])
        binds = [mount.split(":")[0] for mount in service.get("volumes", [])]
        found += [file.parent / bind for bind in binds if bind.startswith(".")]
    return found


def instructions(dockerfile: Path, name: str) -> list[list[str]]:
    """The words of each instruction of that name."""
    whole = dockerfile.read_text().replace("\\\n", " ")
    found = re.findall(rf"^{name} (.+)$", whole, re.MULTILINE)
    return [shlex.split(line) for line in found]


def commands() -> dict[str, list[str]]:
    """What each container runs, `neuroscope` or `ray` first, by where it stands."""
    (default,) = instructions(DOCKER / "Dockerfile.cpu", "CMD")
    words = yaml.safe_load(" ".join(default))
    found = {"Dockerfile.cpu": ["neuroscope", *words]}
    for name, file in COMPOSE.items():
        for service, settings in services(file).items():
            if "neuroscope" not in settings["image"] or "command" not in settings:
                continue
            given = settings["command"]
            if "entrypoint" not in settings:
                found[f"{name}: {service}"] = ["neuroscope", *given]
                continue
            (script,) = given
            script = script.replace("$VLLM_HOST_IP", settings["environment"]["VLLM_HOST_IP"])
            for number, line in enumerate(script.split(";")):
                line = shlex.split(line.strip().removeprefix("exec "))
                found[f"{name}: {service} {number}"] = line
    return found
