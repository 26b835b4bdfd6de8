"""`neuroscope serve`: the two servers as one command."""

from __future__ import annotations

from typing import Any

import click

from neuroscope_vllm.cli.options import neuroscope_flags, settings_from
from neuroscope_vllm.cli.supervise import run_server, vllm_command


@click.command(
    "serve",
    epilog="Everything after -- goes to `vllm serve` untouched, e.g. -- --max-model-len 4096",
)
@click.argument("model")
@neuroscope_flags
@click.option("--port", type=int, default=8080, show_default=True, help="Port of vLLM's own API.")
@click.option("--print-command", is_flag=True, help="Print the equivalent `vllm serve` and exit.")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
def command(
    model: str, port: int, print_command: bool, vllm_flags: tuple[str, ...], **flags: Any
) -> None:
    """Serve MODEL with vLLM and stream its features beside it."""
    settings = settings_from(flags)
    if not settings.configured:
        raise click.UsageError("no SAE was given; name one with --sae, or try `neuroscope demo`.")
    run_server(vllm_command(model, port, settings, vllm_flags), settings, port, print_command)
