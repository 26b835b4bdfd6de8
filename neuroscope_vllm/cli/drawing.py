"""Results as files: JSON, a page of one file, or a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from neuroscope_vllm.cli.engines import writable

FORMS = (".json", ".html", ".png", ".svg")


def form_of(path: Path) -> str:
    return path.suffix.lower()


def drawable(path: Path) -> Path:
    """`path`, as far as that can be told before.

    Raises:
        click.ClickException: It can not be written, or is of no known form.
        ConfigError: A picture can not be drawn here.
    """
    if form_of(path) not in FORMS:
        raise click.UsageError(f"--output {path} ends with none of {', '.join(FORMS)}.")
    if form_of(path) in (".png", ".svg"):
        from neuroscope_vllm.core.pictures import check_pictures

        check_pictures()
    return writable(path)


def write(path: Path, content: Callable[[str], bytes]) -> None:
    """`content` of the form, whole or not at all. Raises click.ClickException."""
    from neuroscope_vllm.core.artefacts import write_whole

    try:
        write_whole(path, content(form_of(path)))
    except OSError as error:
        raise click.ClickException(
            f"{path} can not be written ({error.strerror}); name another file with --output."
        ) from None
    click.echo(f"Wrote {path}", err=True)
