"""The command line from the outside."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import COMMANDS, main


def run(*words: str, **environ: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, words, env=environ)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: " in out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from neuroscope_vllm.cli import main; "
        "heavy = {'torch', 'vllm', 'transformers', 'fastapi', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_seeds_input_is_offered_and_described() -> None:
    _, out, _ = run("serve", "--help")
    assert "divided by their RMS first" in " ".join(out.split())


def config_of(command: str) -> dict[str, object]:
    words = shlex.split(command)
    return json.loads(words[words.index("--additional-config") + 1])


def test_flags_and_environment_end_in_the_printed_command() -> None:
    code, out, _ = run(
        "serve", "m", "--sae", "s", "--layer", "20", "--print-command", NEUROSCOPE_TOP_K="3"
    )
    assert code == 0
    assert config_of(out)["neuroscope"] == {"sae": ["s"], "layer": [20], "top_k": 3}


def test_layers_in_one_word() -> None:
    words = ("serve", "m", "--sae", "gemma-scope", "--layers", "5,12", "--print-command")
    _, out, _ = run(*words)
    assert '{"sae": ["gemma-scope", "gemma-scope"], "layer": [5, 12]}' in out
    code, _, error = run(*words[:4], "--layers", "5,b")
    assert (code, "no list as in 5,12,20" in error) == (2, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--additional-config", '{"mine": 1}'),
        ("--additional_config", '{"mine": 1}'),
        ('--additional-config={"mine": 1}',),
    ],
)
def test_the_users_additional_config_is_merged(words: tuple[str, ...]) -> None:
    flags = ("--", *words)
    _, out, _ = run("serve", "m", "--sae", "s", "--print-command", *flags)
    assert config_of(out) == {"mine": 1, "neuroscope": {"sae": ["s"]}}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("serve", "m"), "no SAE was given"),
        (("serve", "m", "--sae", "s", "--enforce-eager"), "No such option"),
        (("serve", "m", "--sae", "s", "--", "--port", "1"), "before the --"),
        (("serve", "m", "--sae", "s", "--", "--additional-config", "{"), "not JSON"),
        (
            ("serve", "m", "--sae", "s", "--", "--additional_config", '{"neuroscope": {}}'),
            "give its settings as flags",
        ),
        (("serve", "m", "--sae", "s", "--top-k", "0"), "between 1 and 128"),
        (("serve", "m", "--sae", "s", "--config", "/no/such.yaml"), "can not be read"),
        (("nonsense",), "No such command"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(words: tuple[str, ...], match: str) -> None:
    code, _, err = run(*words)
    assert code in (1, 2)
    assert match in err
    assert "Traceback" not in err
