"""`neuroscope export`: one request as a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from neuroscope_vllm.cli.options import api_key_option
from neuroscope_vllm.cli.saving import save
from neuroscope_vllm.core.errors import ConfigError, NeuroscopeError

if TYPE_CHECKING:
    from neuroscope_vllm.core.recording.record import About, RecordedTrace

HELP = """Write the request of this ID, any of its ids, with all its choices to files.

It is asked of the server at --url, which keeps it for a while, or read from what --record kept.

--html is a page that needs neither network nor server; --jsonl has an event a line, as in the
stream (- is stdout); --parquet has an event a row, and can be told again by `neuroscope replay`.
"""


class _Found(NamedTuple):
    about: About
    traces: list[RecordedTrace]
    source: str


@click.command("export", help=HELP)
@click.argument("request_id", metavar="ID")
@click.option(
    "--url", default="http://127.0.0.1:8081", show_default=True, help="Server's feature stream."
)
@api_key_option
@click.option(
    "--record", type=click.Path(exists=True), metavar="DIR", help="Read it from this recording."
)
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page.")
@click.option(
    "--jsonl", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE", help="JSON lines."
)
@click.option("--parquet", type=click.Path(path_type=Path), metavar="FILE", help="Parquet.")
@click.pass_context
def command(
    context: click.Context,
    request_id: str,
    url: str,
    api_key: str | None,
    record: str | None,
    html: Path | None,
    jsonl: Path | None,
    parquet: Path | None,
) -> None:
    from click.core import ParameterSource

    if html is None and jsonl is None and parquet is None:
        raise click.UsageError("say what to write: --html, --jsonl or --parquet.")
    if record is not None and context.get_parameter_source("url") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--url names a server and --record a recording; give one.")
    for flag, path in (("html", html), ("jsonl", jsonl), ("parquet", parquet)):
        _check_writable(flag, path)
    try:
        found = (
            _recorded(request_id, record)
            if record is not None
            else _served(request_id, url, api_key)
        )
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    if jsonl is not None:
        _write(jsonl, _lines(jsonl, found.traces), "--jsonl")
    if html is not None:
        from neuroscope_vllm.core.recording.page import html_page

        _write(html, html_page(*found).encode(), "--html")
    if parquet is not None:
        from neuroscope_vllm.core.recording.files import to_file

        try:
            content = to_file(found.about, found.traces)
        except NeuroscopeError as error:
            raise click.ClickException(str(error)) from None
        _write(parquet, content, "--parquet")


def _lines(path: Path, traces: list[RecordedTrace]) -> bytes:
    lines = [event.named for one in traces for event in one.events]
    if str(path) == "-" and sys.stdout.isatty():
        from neuroscope_vllm.cli.watch_lines import for_terminal

        lines = [for_terminal(line).encode() for line in lines]
    return b"".join(b"%b\n" % line for line in lines)


def _check_writable(flag: str, path: Path | None) -> None:
    if path is None or str(path) == "-":
        return
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise click.ClickException(f"{path} can not be a file; name another with --{flag}.")


def _write(path: Path, content: bytes, flag: str) -> None:
    if str(path) == "-":
        click.echo(content, nl=False)
    else:
        save(path, content, flag, private=True)


def _recorded(request_id: str, record: str) -> _Found:
    """Raises ConfigError."""
    from neuroscope_vllm.core.recording.files import Recording

    recording = Recording(record)
    places = recording.choose([request_id])
    return _Found(places[0].about, [recording.read(p) for p in places], "a recording")


def _served(request_id: str, url: str, api_key: str | None) -> _Found:
    """Raises ConfigError."""
    import httpx
    import msgspec

    from neuroscope_vllm.client.calls import http_options, quoted, refusal
    from neuroscope_vllm.core.recording.record import About, of_answer

    url = url.rstrip("/")
    try:
        with httpx.Client(base_url=url, **http_options(api_key)) as client:
            described = client.get("/v1/features/describe")
            answer = client.get(f"/v1/requests/{quoted(request_id)}")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"no feature stream answers at {url} ({type(error).__name__}); start a server with"
            " `neuroscope serve`, name its features port with --url, or read a recording with"
            " --record."
        ) from None
    if described.status_code in (401, 403):
        raise ConfigError(str(refusal(described)))
    if described.status_code != 200:
        raise ConfigError(
            f"{url} is no neuroscope server's features port (it answers /v1/features/describe with"
            f" {described.status_code}); name that with --url, or read a recording with --record."
        )
    if answer.status_code == 404:
        raise ConfigError(
            f"the server at {url} keeps no request {request_id!r}; it gives up the oldest ones,"
            " which --record would still have."
        )
    try:
        about = msgspec.json.decode(described.content, type=About)
        found = of_answer(answer.content)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{url} is not a neuroscope server of this version: {error}.") from None
    if not all(finished for _, finished in found):
        raise ConfigError(f"request {request_id!r} still runs; export it when it has ended.")
    return _Found(about, [trace for trace, _ in found], url)
