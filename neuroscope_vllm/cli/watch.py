"""`neuroscope watch`: tokens and their features in a terminal, as they come."""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.failures import failures
from neuroscope_vllm.cli.options import api_key_option

if TYPE_CHECKING:
    from neuroscope_vllm.client import Client
    from neuroscope_vllm.client.following import Event

HELP = """Watch a server's tokens and their best features, as they come.

Lines are only ever added, so it works over ssh, in 80 columns and into a pipe. Colour says how
strong a token's best feature is (NO_COLOR turns it off, and figures say it too). What comes from
requests is shown with its control characters made visible.

--feature shows the tokens of all requests on which that feature is among the reported ones, each
with the text before it; a server reports only its top k of a token.

--json prints the events, one JSON object a line, as the stream tells them; with --feature those
tokens alone. Without it output is text, in a pipe, too.

A server that stops is waited for, and the stream resumed where it was. Ends with the request of
--request, else with Ctrl-C (exit code 130).
"""


class _Feature(click.ParamType):
    """[LAYER:]INDEX."""

    name = "feature"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, int]:
        layer, _, index = str(value).rpartition(":")
        if not index.isdecimal() or (layer and not layer.isdecimal()):
            self.fail(f"{value!r} is no feature; give [LAYER:]INDEX, as in 20:6091.", param, ctx)
        return int(layer) if layer else None, int(index)


@dataclass(frozen=True)
class Followed:
    """One feature."""

    layer: int
    index: int
    label: str | None


@click.command("watch", help=HELP)
@click.option(
    "--url", default="http://127.0.0.1:8081", show_default=True, help="Server's feature stream."
)
@api_key_option
@click.option("--request", "request_id", metavar="ID", help="One request, by any of its ids.")
@click.option("--feature", type=_Feature(), metavar="[LAYER:]INDEX", help="Follow this feature.")
@click.option("--layer", type=click.IntRange(0), help="This layer only.")
@click.option("--top-k", type=click.IntRange(1), help="Features per token (3, or what fits).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
def command(
    url: str,
    api_key: str | None,
    request_id: str | None,
    feature: tuple[int | None, int] | None,
    layer: int | None,
    top_k: int | None,
    as_json: bool,
) -> None:
    if feature is not None and top_k is not None:
        raise click.UsageError("--top-k would hide tokens from --feature; give one of them.")
    if feature is not None and layer is not None and feature[0] not in (None, layer):
        raise click.UsageError(f"--feature names layer {feature[0]}, and --layer {layer}.")
    from neuroscope_vllm.client import Client

    try:
        with failures(), Client(url, api_key) as client:
            followed = None if feature is None else _followed(client, feature, layer)
            if followed is not None:
                layer = followed.layer
            _tell_of_connections()
            events = client.stream(request_id, patience=math.inf, layer=layer, top_k=top_k)
            if as_json:
                _print_json(events, followed)
            else:
                _print_lines(events, followed, request_id is None, top_k)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None


def _followed(client: Client, feature: tuple[int | None, int], layer: int | None) -> Followed:
    """The feature, if there is one. Raises click.ClickException."""
    layer, index = feature[0] if feature[0] is not None else layer, feature[1]
    sites = {site.layer: site for site in client.describe().sites}
    served = ", ".join(map(str, sorted(sites))) or "none yet"
    if layer is None and len(sites) != 1:
        raise click.UsageError(
            f"feature {index} is another one on each layer, and here are layers {served}; give"
            " LAYER:INDEX."
        )
    layer = next(iter(sites)) if layer is None else layer
    if layer not in sites:
        raise click.ClickException(f"layer {layer} is not observed here; {served} is.")
    width = int(sites[layer].sae["width"])
    if index >= width:
        raise click.ClickException(
            f"layer {layer} has features 0 to {width - 1}, and {index} was asked for."
        )
    labels = client.features.search(index=index, layer=layer, limit=1)
    return Followed(layer, index, labels[0].text if labels else None)


def _tell_of_connections() -> None:
    """What the client logs of connections lost and found goes to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("neuroscope_vllm.client.following")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _print_json(events: Iterator[Event], followed: Followed | None) -> None:
    from neuroscope_vllm.cli.watch_lines import for_terminal
    from neuroscope_vllm.core.events import EVENTS, GapEvent, TokenEvent, encoder

    names = {kind: name for name, kind in EVENTS.items()}
    for event in events:
        name = names[type(event)]
        if isinstance(event, TokenEvent):
            name = event.phase or "token"
            if followed is not None and not any(
                one.index == followed.index for one in event.top_features
            ):
                continue
        elif followed is not None and not isinstance(event, GapEvent):
            continue
        line = b'{"event":"%b",' % name.encode() + encoder.encode(event)[1:]
        click.echo(for_terminal(line) if sys.stdout.isatty() else line)


def _print_lines(
    events: Iterator[Event], followed: Followed | None, everything: bool, top_k: int | None
) -> None:
    from rich.console import Console

    from neuroscope_vllm.cli.watch_lines import FeatureLines, TokenLines

    if isinstance(sys.stdout, io.TextIOWrapper):  # labels hold more than a latin-1 terminal has
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    if followed is not None:
        lines = FeatureLines(console, followed.layer, followed.index, followed.label)
    else:
        lines = TokenLines(console, numbered=everything, top_k=top_k)
    for event in events:
        lines.show(event)
