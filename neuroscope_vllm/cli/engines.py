"""Options of the commands that run an engine of their own, and that engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.demo import demo_model, with_demo_saes
from neuroscope_vllm.cli.options import backend_flags, check_device, settings_from
from neuroscope_vllm.cli.supervise import console

if TYPE_CHECKING:
    from neuroscope_vllm.core.config import Settings
    from neuroscope_vllm.engine.protocol import Engine
    from neuroscope_vllm.engine.spec import EngineSpec

DEMO = "demo"
"""As a model: the embedded one."""
HERE = ""
"""As an address: $RAY_ADDRESS, or a cluster that is started for the run."""

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
    backend_flags,
    click.option(
        "--ray",
        is_flag=False,
        flag_value=HERE,
        metavar="[ADDRESS]",
        help="Spread the work over Ray workers: of $RAY_ADDRESS, else of this machine; or of the"
        " cluster at ADDRESS (host:port or auto).",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Ray workers (one for each GPU, or two on each host without).",
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
    *,
    ray: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **flags: Any,
) -> Engine:
    """The engine that the options ask for; without MODEL the embedded demo.

    Args:
        ray: Address of a Ray cluster, or HERE; None: one engine, in this process.
        workers: How many engines on Ray.
        device, dtype: For transformers.

    Raises click.ClickException and NeuroscopeError, one sentence each.
    """
    if model is None:
        console.print("no MODEL given: the embedded demo")
    if backend == "transformers" and vllm_flags:
        raise click.UsageError(f"{vllm_flags[0]} is for vLLM, not for transformers.")
    check_device(backend, device, dtype)
    if workers and ray is None:
        raise click.UsageError("--workers is for --ray; give both, or leave it out.")
    model, settings = chosen(model or DEMO, flags)
    asked = engine_spec(model, settings, backend, max_tokens, vllm_flags, device, dtype)
    if ray is None:
        return start_engine(asked)

    from neuroscope_vllm.engine.ray_engines import RayEngines

    with console.status("starting the Ray workers"):
        return RayEngines(asked, address=ray or None, workers=workers)


def chosen(model: str, flags: dict[str, Any]) -> tuple[str, Settings]:
    """The model's folder or hub id, and what reads it.

    Raises click.ClickException and NeuroscopeError, one sentence each.
    """
    if model == DEMO:
        flags = with_demo_saes(flags)
    model = located(model)
    settings = settings_from(flags)
    if not settings.configured:
        raise click.UsageError("name the SAE with --sae (and --layer, if it records none).")
    return model, settings


def located(model: str) -> str:
    """The model's folder or hub id.

    Raises click.ClickException and NeuroscopeError, one sentence each.
    """
    if model == DEMO:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        return str(demo_model())
    if model.startswith((os.sep, ".", "~")):
        if not Path(model).expanduser().is_dir():
            raise click.ClickException(f"model {model} is no folder; give one, or a hub id.")
        return str(Path(model).expanduser())
    return model


def start_engine(asked: EngineSpec) -> Engine:
    """Raises NeuroscopeError, one sentence."""
    here = asked.backend == "transformers"
    with console.status("loading the model and the SAE" if here else "starting vLLM"):
        return asked.open()


def engine_spec(
    model: str,
    settings: Settings,
    backend: str,
    max_tokens: int | None = None,
    vllm_flags: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
) -> EngineSpec:
    from neuroscope_vllm.engine.spec import EngineSpec

    return EngineSpec(
        model=model,
        settings=settings,
        backend="transformers" if backend == "transformers" else "vllm",
        max_tokens=max_tokens,
        vllm_flags=tuple(vllm_flags),
        device=device or "auto",
        dtype=dtype or "auto",
    )


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
