"""`neuroscope keys`: the secret that a hub and its engines share."""

from __future__ import annotations

from pathlib import Path

import click

from neuroscope_vllm.core.errors import ConfigError


@click.command("keys")
@click.argument("file", type=click.Path(path_type=Path))
def command(file: Path) -> None:
    """Write new keys to FILE, for the setting hub_keys of the hub and of every engine."""
    from neuroscope_vllm.core.keys import create_keys

    try:
        create_keys(file)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Wrote {file}: a secret; copy it, with mode 600, to the hub's and engines' hosts.")
