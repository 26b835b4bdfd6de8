"""`neuroscope rules`: what rules would have done on recorded traces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.demo import with_demo_saes
from neuroscope_vllm.cli.engines import sae_flags
from neuroscope_vllm.cli.failures import in_a_sentence
from neuroscope_vllm.cli.options import api_key_option

if TYPE_CHECKING:
    from neuroscope_vllm.core.steering.catalogue import Catalogue
    from neuroscope_vllm.core.steering.dry_run import DryRun

HELP = """Hold the rules of a steering FILE against recorded TRACEs.

FILE is the one of `serve --steering`. A TRACE is what GET :8081/v1/requests/{id} answered, in a
file, or the id of a request that the server at --url still keeps. Nothing is run: a rule is held
against what the model did write. Without --sae the rules are of the embedded demo's.

A trace holds the top features of each token. Where more were active than it holds, it can not tell
how active another one was: such tokens are counted as unknown. Serve with a larger --top-k, or with
--ranking activation, to have fewer.

--json prints a list with an object for each rule and choice: rule, request_id, choice, tokens,
unknown, hits (position, token and activation), steered (positions), stops_at, and surely: whether
no token before the first hit is unknown.
"""


@click.command("rules", help=HELP)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@sae_flags
@click.option("--calibration", multiple=True, help="Calibration file of each SAE.")
@click.option(
    "--url", default="http://127.0.0.1:8081", show_default=True, help="Server's feature stream."
)
@api_key_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def command(
    file: str,
    traces: tuple[str, ...],
    url: str,
    api_key: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    from neuroscope_vllm.core.errors import ConfigError
    from neuroscope_vllm.core.steering.dry_run import dry_run
    from neuroscope_vllm.core.steering.settle import SteeringRefused, settle
    from neuroscope_vllm.core.steering.spec import SteeringSpec

    with in_a_sentence():
        try:
            steering = settle(SteeringSpec(), _catalogue(file, flags))
        except SteeringRefused as refusal:
            raise ConfigError(f"steering file {file}: {refusal}") from None
        if steering is None or not steering.rules:
            raise click.ClickException(f"steering file {file} has no rules; add some under rules.")
        found = [
            one for trace in traces for one in dry_run(steering, _choices(trace, url, api_key))
        ]
    if as_json:
        import msgspec

        click.echo(json.dumps(msgspec.to_builtins(found), indent=2, ensure_ascii=False))
    else:
        _print(found)


def _catalogue(file: str, flags: dict[str, Any]) -> Catalogue:
    from neuroscope_vllm.cli.options import settings_from
    from neuroscope_vllm.core.sae import load_sae
    from neuroscope_vllm.core.sae.observed import calibration_of, observed
    from neuroscope_vllm.core.steering.catalogue import Catalogue, Operator, Site

    settings = settings_from(with_demo_saes(flags))
    sites, d_model = {}, 0
    for number, (layer, info) in enumerate(observed(settings).items()):
        calibrated = calibration_of(settings, number, info)
        sae = load_sae(settings.sae[number])
        sites[layer] = Site.of(sae, calibrated[1] if calibrated else None, settings.sae_input)
        d_model = sae.d_model
    return Catalogue.build(sites, Operator.load(file), d_model=d_model)


def _choices(trace: str, url: str, api_key: str | None) -> list[dict[str, Any]]:
    """Raises click.ClickException: there is no such trace."""
    if Path(trace).exists():
        content, where = Path(trace).read_bytes(), trace
    else:
        content, where = _fetched(trace, url, api_key), f"the answer of {url}"
    import msgspec

    from neuroscope_vllm.core.events import TokenEvent
    from neuroscope_vllm.core.steering.dry_run import TOKENS

    try:
        choices = json.loads(content)["choices"]
        for choice in choices:
            msgspec.convert([choice["request_id"], choice["choice"]], tuple[str, int])
            tokens = [event for event in choice["events"] if event["event"] in TOKENS]
            msgspec.convert(tokens, list[TokenEvent])
        return choices
    except (ValueError, KeyError, TypeError):  # msgspec.ValidationError is a ValueError
        pass
    raise click.ClickException(
        f"{where} holds no trace; give what GET {url}/v1/requests/{{id}} answers."
    )


def _fetched(request_id: str, url: str, api_key: str | None) -> bytes:
    import httpx

    from neuroscope_vllm.client.calls import http_options, refusal

    try:
        with httpx.Client(base_url=url.rstrip("/"), **http_options(api_key)) as client:
            answer = client.get(f"/v1/requests/{request_id}")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise click.ClickException(
            f"{request_id} is no file, and no server answers at {url} ({error}); give a trace's"
            " file, or say where the server is with --url."
        ) from None
    if answer.status_code in (401, 403):
        raise click.ClickException(str(refusal(answer)))
    if answer.status_code != 200:
        raise click.ClickException(
            f"{request_id} is no file, and the server at {url} keeps no such request; give a"
            " trace's file, or the id of a recent request."
        )
    return answer.content


def _print(found: Sequence[DryRun]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What rules would have done")
    for column in ("rule", "request", "tokens", "unknown", "met at", "steered", "stops at"):
        table.add_column(column)
    for one in found:
        met = ", ".join(
            f"{hit.position} {hit.token!r} {hit.activation:.1f}" for hit in one.hits[:4]
        )
        if len(one.hits) > 4:
            met += f", and {len(one.hits) - 4} more"
        table.add_row(
            Text(one.rule),
            Text(f"{one.request_id} {one.choice}" if one.choice else one.request_id),
            str(one.tokens),
            str(one.unknown),
            Text(met or ("unknown" if one.unknown else "never")),
            f"{len(one.steered)} tokens" if one.steered else "",
            "" if one.stops_at is None else f"{'' if one.surely else '≤ '}{one.stops_at}",
        )
    Console().print(table)
    if 2 * sum(one.unknown for one in found) > sum(one.tokens for one in found):
        Console(stderr=True).print(
            "Of most tokens the traces do not say how active the features were; serve with a larger"
            " --top-k and --ranking activation while you record."
        )
