"""The files of docker/: good to the tools that read them, and true of what they start.

No image is built and no container run: there is no engine for that where these tests run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from neuroscope_vllm.cli.supervise import DRAIN_S, END_S
from neuroscope_vllm.core.launch import STOP_S
from neuroscope_vllm.server import otel, recorder
from neuroscope_vllm.server.__main__ import GRACEFUL_S
from tests.deploy import files
from tests.deploy.files import COMPOSE, DOCKER, DOCKERFILES, ROOT
from tests.support.served import bin_path

IMAGE_ENV = {"NEUROSCOPE_FEATURES_HOST": "0.0.0.0"}
"""Of both Dockerfiles, as far as it is ours."""


def run(*words: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hadolint() -> None:
    run(bin_path("hadolint"), *DOCKERFILES)


def test_shellcheck() -> None:
    # SC1087: "$root[demo]" is a requirement with its extra, and no element of an array.
    run(bin_path("shellcheck"), "--exclude=SC1087", *files.SCRIPTS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_alerts_fire_when_they_should() -> None:
    run("promtool", "test", "rules", Path(__file__).parent / "alerts.yml")


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_are_as_the_specification_says(name: str, tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump(files.interpolated(COMPOSE[name], files.values(COMPOSE[name]))))
    run(bin_path("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file)


@pytest.mark.parametrize(("name", "example"), [("one host", "env.example"), ("ray", "README.md")])
def test_compose_refuses_to_start_without_a_secret(name: str, example: str) -> None:
    required = files.required(COMPOSE[name])
    assert {"NEUROSCOPE_ADMIN_KEYS", "VLLM_API_KEY"} <= set(required)
    for variable in required:
        with pytest.raises(ValueError, match=f"{variable} is missing a value: set it in docker"):
            files.interpolated(COMPOSE[name], files.values(COMPOSE[name]) | {variable: ""})
        assert variable in (DOCKER / example).read_text()


def test_prometheus_has_a_key_for_the_metrics_alone() -> None:
    given = files.values(COMPOSE["one host"])
    for service in ("cuda", "cpu"):
        environment = files.services(COMPOSE["one host"])[service]["environment"]
        assert environment["NEUROSCOPE_METRICS_KEYS"] == given["METRICS_KEY"]
        assert environment["NEUROSCOPE_ADMIN_KEYS"] == given["NEUROSCOPE_ADMIN_KEYS"]
    secrets = yaml.safe_load(COMPOSE["one host"].read_text())["secrets"]
    assert secrets == {"metrics_key": {"environment": "METRICS_KEY"}}
    scraping = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (ours,) = [one for one in scraping["scrape_configs"] if one["job_name"] == "neuroscope"]
    assert ours["authorization"] == {"credentials_file": "/run/secrets/metrics_key"}


def test_what_is_copied_and_mounted_exists() -> None:
    made_by_the_operator = DOCKER / "ray" / "hub.keys"
    for file in COMPOSE.values():
        missing = [path for path in files.sources(file) if not path.exists()]
        assert set(missing) <= {made_by_the_operator}
    # Most specific last, as Docker reads it; our patterns are plain names.
    kept = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for dockerfile in DOCKERFILES:
        for *sources, _ in files.instructions(dockerfile, "COPY"):
            for source in sources:
                assert (ROOT / source).exists()
                assert source in kept


@pytest.mark.parametrize("name", COMPOSE)
def test_containers_hold_little_power(name: str) -> None:
    for service, settings in files.services(COMPOSE[name]).items():
        assert settings["cap_drop"] == ["ALL"], service
        assert settings["security_opt"] == ["no-new-privileges:true"]
        assert settings.get("read_only") or "secrets" in settings
        assert settings["logging"]["options"].keys() == {"max-size", "max-file"}
        ours = "build" in settings
        assert ours or re.search(r":v?\d+\.\d+\.\d+$", settings["image"]), "no version"
    for dockerfile in DOCKERFILES:
        assert files.instructions(dockerfile, "USER")[-1] == ["10001:10001"]


def test_what_vllm_brought_stays_as_it_is() -> None:
    installs = [words for words in files.instructions(DOCKERFILES[0], "RUN") if "install" in words]
    assert len(installs) == 2
    for words in installs:
        assert words[words.index("--constraint") + 1] == "/opt/vllm.txt"


@pytest.fixture(scope="module")
def vllm_words() -> dict[str, list[str]]:
    """What `vllm serve` would be given, by where it stands: as our own CLI prints it."""
    found = {}
    for where, (program, *words) in files.commands().items():
        if program == "neuroscope" and words[0] in ("serve", "demo"):
            words.insert(1, "--print-command")
            printed = run(bin_path("neuroscope"), *words, env=IMAGE_ENV)
            found[where] = shlex.split(printed)
    return found


def test_our_settings_come_through(vllm_words: dict[str, list[str]]) -> None:
    assert len(vllm_words) == 4
    for where, words in vllm_words.items():
        settings = json.loads(words[words.index("--additional-config") + 1])["neuroscope"]
        assert settings["features_host"] == "0.0.0.0"
        assert settings["sae"]
        assert ("hub" in settings) == where.startswith("ray")


def test_chats_may_end_before_a_container_is_killed(vllm_words: dict[str, list[str]]) -> None:
    for name, file in COMPOSE.items():
        for service, settings in files.services(file).items():
            for where in (where for where in vllm_words if where.startswith(f"{name}: {service}")):
                words = vllm_words[where]
                drain = int(words[words.index("--shutdown-timeout") + 1])
                assert drain > DRAIN_S
                assert drain + END_S <= int(settings["stop_grace_period"].removesuffix("s"))
    assert END_S > STOP_S > GRACEFUL_S + recorder.CLOSE_S >= GRACEFUL_S + otel.CLOSE_S


def test_vllm_takes_them(vllm_words: dict[str, list[str]]) -> None:
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.cli.serve import cmd_init\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = FlexibleArgumentParser()\n"
        "commands = parser.add_subparsers()\n"
        "[command.subparser_init(commands) for command in cmd_init()]\n"
        "parsed = [parser.parse_args(words[1:]) for words in json.loads(sys.argv[1])]\n"
        "print(json.dumps([args.host for args in parsed]))"
    )
    printed = run(sys.executable, "-c", code, json.dumps(list(vllm_words.values())))
    assert json.loads(printed.splitlines()[-1]) == ["0.0.0.0"] * len(vllm_words)


def test_the_other_commands_are_real_ones() -> None:
    from ray.scripts.scripts import cli as ray

    from neuroscope_vllm.cli.main import main as neuroscope

    seen = []
    for program, *words in files.commands().values():
        if program == "ray" or words[0] == "hub":
            cli: Any = ray if program == "ray" else neuroscope
            command = cli.get_command(None, words[0])
            command.make_context(words[0], list(words[1:]))  # an unknown flag is an error
            seen.append(words[0])
    assert seen == ["hub", "start", "start"]


def test_versions_are_supported_ones() -> None:
    extras = files.PROJECT["optional-dependencies"]
    for dockerfile, extra in zip(DOCKERFILES, ("vllm", "cpu"), strict=True):
        ((argument,),) = files.instructions(dockerfile, "ARG")
        requirement = Requirement(extras[extra][0])
        assert requirement.specifier.contains(argument.removeprefix("VLLM_VERSION="))
    (ray,) = [one for one in extras["dev"] if one.startswith("ray")]
    assert f"'{ray}'" in (DOCKER / "Dockerfile").read_text()
