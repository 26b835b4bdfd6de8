"""Flags shared by the commands that start a server, and how they become Settings.

A flag that was not given stays out, so that the environment and the YAML file can speak:
flags > NEUROSCOPE_* > file (see core.config.resolve).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from neuroscope_vllm.core.access import VLLM_KEY_VARIABLE
from neuroscope_vllm.core.config import API_KEY_VARIABLE, Settings, merge, resolve
from neuroscope_vllm.core.errors import NeuroscopeError

_FLAGS = [
    click.option("--sae", multiple=True, help="SAE file, folder or hf:// address; one per layer."),
    click.option("--layer", multiple=True, type=int, help="Layer of each SAE, if it records none."),
    click.option(
        "--layers",
        help="The same in one word, as in 5,12,20; `--sae gemma-scope` has an SAE of each, and the"
        " demo of 10, 20 and 28.",
    ),
    click.option("--calibration", multiple=True, help="Calibration file of each SAE."),
    click.option("--labels", multiple=True, help="Label files (JSONL)."),
    click.option(
        "--ranking",
        type=click.Choice(["zscore", "tail", "quantile", "activation"]),
        help="Order of a token's features.",
    ),
    click.option("--top-k", type=int, help="Features reported per token (8)."),
    click.option("--max-frequency", type=float, help="Hide features more frequent than this."),
    click.option(
        "--sae-input",
        type=click.Choice(["raw", "rms"]),
        help="What the SAE reads: residuals as they are (raw, the default), or divided by their RMS"
        " first, as the Neuroscope that this one follows does (rms; wrong for Gemma Scope).",
    ),
    click.option("--steering", help="File with presets, directions, rules and limits of steering."),
    click.option("--guide", help="File with messages that the page suggests."),
    click.option("--features-host", help="Address of the feature stream (127.0.0.1)."),
    click.option("--features-port", type=int, help="Port of the feature stream (8081)."),
    click.option("--admin-keys-file", help="File of keys that read everything, one a line."),
    click.option("--metrics-keys-file", help="File of keys that read /metrics alone."),
    click.option("--allowed-origins", multiple=True, help="Origin of a page that may ask there."),
    click.option("--hub", help="Hub that runs apart: tcp://host:port or ipc://path."),
    click.option("--hub-keys", help="Key file of a tcp:// hub."),
    click.option("--record", metavar="DIR", help="Record finished requests in this folder."),
    click.option("--record-rate", type=float, help="Share of requests to record (1)."),
    click.option("--record-days", type=int, help="Days that recorded requests are kept (0: all)."),
    click.option(
        "--record-redact",
        type=click.Choice(["none", "text"]),
        help="text: record features without the texts and ids of tokens.",
    ),
    click.option(
        "--otel",
        is_flag=True,
        default=None,
        help="Export a log event per request and rule hit over OTLP, as OTEL_* variables say.",
    ),
    click.option("--config", type=click.Path(), help="YAML file with any of these settings."),
]

PORT = click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8080,
    show_default=True,
    help="Port of the OpenAI API.",
)


def neuroscope_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_FLAGS):
        command = option(command)
    return command


_DEVICE_FLAGS = [
    click.option(
        "--device",
        type=click.Choice(["auto", "mps", "cuda", "cpu"]),
        help="For transformers: where the model runs (auto).",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="For transformers: its precision (auto); vLLM's own goes after the --.",
    ),
]
api_key_option = click.option(
    "--api-key",
    envvar=[API_KEY_VARIABLE, VLLM_KEY_VARIABLE],
    help="The server's key: one of vLLM's, or where nothing is sent to vLLM an admin's.",
    show_envvar=True,
)
_BACKEND = click.option(
    "--backend",
    type=click.Choice(["vllm", "transformers"]),
    default="vllm",
    show_default=True,
    help="What runs the model; transformers needs no vLLM, and runs on a Mac.",
)


def device_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_DEVICE_FLAGS):
        command = option(command)
    return command


def backend_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    return _BACKEND(device_flags(command))


def check_device(backend: str, device: str | None, dtype: str | None) -> None:
    """Raises click.UsageError if they are given to vLLM."""
    if backend == "vllm" and device is not None:
        raise click.UsageError("--device is for --backend transformers; vLLM finds its own.")
    if backend == "vllm" and dtype is not None:
        raise click.UsageError("--dtype is for --backend transformers; give vLLM's after the --.")


def settings_from(flags: dict[str, Any]) -> Settings:
    """Raises click.ClickException with the one sentence that says what is wrong."""
    try:
        return resolve(given(flags))
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None


def asked(flags: dict[str, Any], name: str) -> Any:
    """What flags, variables or the file say of a setting, as it is there; None if nothing.

    Raises click.ClickException, one sentence.
    """
    try:
        return merge(given(flags)).get(name)
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that were given, with --layers as `layer`. Raises click.UsageError."""
    found: dict[str, Any] = {
        name: list(v) if isinstance(v, tuple) else v for name, v in flags.items()
    }
    if (layers := found.pop("layers", None)) is not None:
        if found.get("layer"):
            raise click.UsageError("--layer and --layers exclude each other.")
        try:
            found["layer"] = [int(layer) for layer in layers.split(",")]
        except ValueError:
            raise click.UsageError(f"--layers {layers} is no list as in 5,12,20.") from None
    return {name: v for name, v in found.items() if v not in (None, [])}
