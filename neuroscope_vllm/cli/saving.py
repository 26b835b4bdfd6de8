"""Files that commands write for who runs them."""

from __future__ import annotations

from pathlib import Path

import click


def save(path: Path, content: bytes, flag: str, private: bool = False) -> None:
    """Write a file whole or not at all, and say so.

    Args:
        flag: The one that named it.
        private: For its owner alone.

    Raises:
        click.ClickException: It can not be written.
    """
    from neuroscope_vllm.core.artefacts import write_whole
    from neuroscope_vllm.core.recording.folder import write_private

    write = write_private if private else write_whole
    try:
        write(path, content)
    except OSError as error:
        raise click.ClickException(
            f"{path} can not be written ({error.strerror}); name another file with {flag}."
        ) from None
    click.echo(f"Wrote {path}", err=True)
