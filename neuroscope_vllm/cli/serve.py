"""`neuroscope serve`: the two servers as one command."""

from __future__ import annotations

from typing import Any

import click

from neuroscope_vllm.cli.options import PORT, backend_flags, neuroscope_flags, settings_from
from neuroscope_vllm.cli.supervise import run_server, server_command


@click.command(
    "serve",
    epilog="Everything after -- goes to `vllm serve` untouched, e.g. -- --max-model-len 4096",
)
@click.argument("model")
@backend_flags
@neuroscope_flags
@PORT
@click.option("--print-command", is_flag=True, help="Print the server's own command and exit.")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
def command(
    model: str,
    backend: str,
    device: str | None,
    dtype: str | None,
    port: int,
    print_command: bool,
    vllm_flags: tuple[str, ...],
    **flags: Any,
) -> None:
    """Serve MODEL and stream its features beside it."""
    settings = settings_from(flags)
    if not settings.configured:
        raise click.UsageError("no SAE was given; name one with --sae, or try `neuroscope demo`.")
    words = server_command(backend, model, port, settings, device, dtype, vllm_flags)
    run_server(words, settings, port, print_command)
