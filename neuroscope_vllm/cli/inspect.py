"""`neuroscope inspect`: the features of a text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.engines import sae_flags
from neuroscope_vllm.cli.options import api_key_option, device_flags
from neuroscope_vllm.core.errors import NeuroscopeError

if TYPE_CHECKING:
    from neuroscope_vllm.cli.inspect_sources import Given, Source
    from neuroscope_vllm.core.inspection.record import Inspected

HELP = """Show which features fire on each token of a TEXT; - reads stdin.

Without --model it asks a running server, and features are labelled and ranked as served; --layer
chooses among the layers that it observes. With --model and --sae it runs the model here; `--model
demo` is the embedded one. Special tokens and attention sinks are shown without features.

--json prints one object a text and line: text, file, chat, model, source, sites, tokens and
features. tokens has an entry for each token and layer: position, token, token_id, layer,
top_features (index, label, activation and score), l0, features_at, sink and special, as in the
stream's events. features has what --feature asked for: index, label, layer, and activations by
position, null on special tokens and sinks.
"""


@click.command("inspect", help=HELP)
@click.argument("texts", nargs=-1, metavar="TEXT...")
@click.option("--file", "files", multiple=True, help="Read a text from a file.", metavar="FILE")
@click.option("--chat", is_flag=True, help="Each text is a user's message to the model.")
@click.option(
    "--url", default="http://127.0.0.1:8081", show_default=True, help="Server's feature stream."
)
@api_key_option
@click.option("--model", help="Folder or hub id of a model to run here, or demo.")
@sae_flags
@click.option(
    "--backend",
    type=click.Choice(["transformers", "vllm"]),
    help="What runs --model (transformers, if it is installed).",
)
@device_flags
@click.option("--top-k", type=click.IntRange(1), help="Features per token (8, or as served).")
@click.option(
    "--feature",
    "features",
    multiple=True,
    type=click.IntRange(0),
    help="Show this feature on every token, whatever its rank; with --model.",
    metavar="INDEX",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with coloured tokens.")
@click.pass_context
def command(
    context: click.Context,
    texts: tuple[str, ...],
    files: tuple[str, ...],
    chat: bool,
    as_json: bool,
    html: Path | None,
    **options: Any,
) -> None:
    _check_usage(context, options)
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise click.ClickException(f"{html} can not be a file; name another with --html.")
    try:
        given = _given(texts, files)
        with contextlib.ExitStack() as stack:
            source = _source(chat, html is not None, options, stack)
            inspected = [source.inspect(one) for one in given]
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    for note in source.notes:
        click.echo(f"Note: {note}.", err=True)
    if as_json:
        _print_json(inspected)
    elif html is None:
        from neuroscope_vllm.cli.inspect_table import print_tables

        print_tables([one.record for one in inspected], [one.name for one in given])
    if html is not None:
        _write_page(html, given, inspected, source)


def _check_usage(context: click.Context, options: dict[str, Any]) -> None:
    """Raises click.UsageError where options of the two sources are mixed."""
    from click.core import ParameterSource

    if options["model"] is None:
        for name in ("sae", "sae_input", "config", "backend", "device", "dtype"):
            if options[name]:
                flag = name.replace("_", "-")
                raise click.UsageError(f"--{flag} is for --model; a server has its own.")
        if options["features"]:
            raise click.UsageError(
                "--feature needs --model and --sae: a server reports only the best features of"
                " each token, which does not tell whether another one is active."
            )
    elif context.get_parameter_source("url") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--url names a server, and --model runs without one; give one.")


def _given(texts: Sequence[str], files: Sequence[str]) -> list[Given]:
    from neuroscope_vllm.cli.inspect_sources import Given

    if not texts and not files:
        raise click.UsageError("give a TEXT, - for stdin, or --file.")
    if [*texts, *files].count("-") > 1:
        raise click.UsageError("stdin can be read once; give - once.")
    given = [_read("-") if text == "-" else Given(text, None) for text in texts]
    given += [_read(file) for file in files]
    for one in given:
        if not one.text:
            raise click.ClickException(f"{one.name} is empty; give some text.")
        if not _is_text(one.text):
            raise click.ClickException(f"{one.name} is not text in UTF-8; give a text file.")
    return given


def _read(file: str) -> Given:
    """A whole file, as it stands."""
    from neuroscope_vllm.cli.inspect_sources import Given

    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise click.ClickException(f"{file} can not be read ({error.strerror}).") from None
    return Given(data.decode(errors="surrogateescape"), file)


def _is_text(text: str) -> bool:
    """Whether it is neither binary nor, as `surrogateescape` marks it, of another encoding."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _source(
    chat: bool, everywhere: bool, options: dict[str, Any], stack: contextlib.ExitStack
) -> Source:
    url, api_key, model = options.pop("url"), options.pop("api_key"), options.pop("model")
    from neuroscope_vllm.cli.inspect_sources import Offline, Server

    if model is None:
        return Server(url, api_key, chat, options["top_k"], options["layer"])
    backend, features = options.pop("backend"), tuple(dict.fromkeys(options.pop("features")))
    offline = Offline(model, backend, chat, features, everywhere, options)
    stack.callback(offline.close)
    return offline


def _print_json(inspected: list[Inspected]) -> None:
    from neuroscope_vllm.core.json_text import to_json

    for one in inspected:
        click.echo(to_json(one.record))


def _write_page(path: Path, given: list[Given], inspected: list[Inspected], source: Source) -> None:
    from neuroscope_vllm.core.inspection.page import PageText, trace_page

    first = inspected[0].record
    about = [f"{first.model}, from {first.source}"]
    about += [f"layer {s.layer}: {s.sae}, ranked by {s.ranking}" for s in first.sites]
    if inspected[0].firings is None:
        about.append(f"a feature is known only where it is among the {first.sites[0].top_k} best")
    texts = [
        PageText(
            heading=name.name if name.file is not None else f"text {number}",
            tokens=one.record.tokens,
            firings=one.firings,
            features=one.record.features,
        )
        for number, (name, one) in enumerate(zip(given, inspected, strict=True), start=1)
    ]
    page = trace_page(f"{first.model}: features", [*about, *source.notes], texts)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(
            f"{path} can not be written ({error.strerror}); name another file with --html."
        ) from None
    click.echo(f"Wrote {path}", err=True)
