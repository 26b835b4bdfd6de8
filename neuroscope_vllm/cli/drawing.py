"""Results as files: JSON, a page of one file, or a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from neuroscope_vllm.cli.engines import writable
from neuroscope_vllm.cli.saving import save

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
    """`content` of the form. Raises click.ClickException."""
    save(path, content(form_of(path)), "--output")
