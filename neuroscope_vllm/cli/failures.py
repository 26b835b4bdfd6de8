"""How commands end when something can not be: with a sentence, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from neuroscope_vllm.core import errors

EXIT_CODES: dict[type[errors.NeuroscopeError], tuple[int, str]] = {
    errors.DownloadError: (3, "the hub refused, or sent something wrong"),
    errors.GatedError: (4, "a gated repository whose terms you did not accept"),
    errors.NoRepositoryError: (5, "no such repository, or a private one"),
    errors.NoRevisionError: (6, "no such branch, tag or commit"),
    errors.NoFileError: (7, "no such file in the repository"),
    errors.UnreachableError: (8, "no network, or HF_HUB_OFFLINE, and it is not in the cache"),
    errors.NotLoggedInError: (9, "not logged in, or a token that is not valid"),
    errors.NotAllowedError: (10, "your account or token may not do that"),
    errors.DiskFullError: (11, "no room left on the disk"),
    errors.LockError: (12, "the lock file is damaged, or not what was asked or found"),
}

EPILOG = "\b\nExit codes: 0 done; 1 something you gave cannot be used; 2 wrong usage\n" + "\n".join(
    f"  {code:>2}  {meaning}" for code, meaning in EXIT_CODES.values()
)


@contextmanager
def failures() -> Iterator[None]:
    """Any error of ours becomes its message on stderr and its exit code."""
    try:
        yield
    except errors.NeuroscopeError as error:
        click.echo(f"Error: {error}", err=True)
        codes = (EXIT_CODES[kind][0] for kind in type(error).__mro__ if kind in EXIT_CODES)
        raise click.exceptions.Exit(next(codes, 1)) from None


@contextmanager
def in_a_sentence(again: str = "the same command again") -> Iterator[None]:
    """For a command that keeps what is done: it ends with one sentence where it can not go on.

    Args:
        again: What goes on where it stopped.
    """
    from neuroscope_vllm.cli.supervise import console

    try:
        yield
    except errors.NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(
            f"{error.filename or 'a file'} can not be used ({error.strerror or error}); what is"
            f" done is kept, so mend that and give {again}."
        ) from None
    except KeyboardInterrupt:
        console.print(f"neuroscope: stopped; give {again} to go on")
        raise click.exceptions.Exit(130) from None
