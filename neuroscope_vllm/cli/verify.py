"""`neuroscope verify`: is what a running server streams the truth?"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import click
import httpx
import msgspec

from neuroscope_vllm.cli.options import api_key_option
from neuroscope_vllm.core.audit import FAULTS, Verdict

if TYPE_CHECKING:
    from neuroscope_vllm.cli.recompute import Recomputation

HELP = """Check a running server's features against an offline recomputation.

Sends a storm of staggered requests with distinct texts (chats and completions, streamed and whole,
shared prefixes, n=2, stop strings, clients that leave half-way), reads each one's feature stream,
and recomputes every token in float32 with transformers and the SAE. Exit code 0: nothing missing,
duplicated, misattributed or wrong; 1: something was; 2: it could not be checked.

A float32 server must agree to 1e-3. A bfloat16 server's own rounding moves the features of the demo
model by up to 11 %; those of a neighbouring token lie at least 29 % away (median 150 %). So there
the tolerance is 20 %: rounding is no fault, and rows in the wrong place do not pass as rounding.
"""


@click.command("verify", help=HELP)
@click.option(
    "--url", default="http://127.0.0.1:8081", show_default=True, help="URL of the feature stream."
)
@click.option("--model", help="Model for transformers (default: what vLLM serves).")
@click.option("--sae", multiple=True, help="SAE of each observed layer (default: as served).")
@click.option("--requests", default=32, show_default=True, type=click.IntRange(1))
@click.option("--concurrency", default=16, show_default=True, type=click.IntRange(1))
@click.option(
    "--max-tokens",
    default=48,
    show_default=True,
    type=click.IntRange(1),
    help="Tokens generated per request.",
)
@api_key_option
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Relative error of an activation (0.001 if the server runs in float32, else 0.2).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.pass_context
def command(
    context: click.Context,
    url: str,
    model: str | None,
    sae: tuple[str, ...],
    requests: int,
    concurrency: int,
    max_tokens: int,
    api_key: str | None,
    tolerance: float | None,
    as_json: bool,
) -> None:
    # Before torch is loaded. A CPU server on the same machine leaves no core idle, and threads that
    # spin while they wait for each other then make the recomputation six times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from rich.progress import Progress

    from neuroscope_vllm.cli.recompute import Recomputation
    from neuroscope_vllm.cli.storm import VerifyError, mix, storm
    from neuroscope_vllm.cli.supervise import console
    from neuroscope_vllm.core.errors import NeuroscopeError

    description, served = ask_server(url.rstrip("/"), api_key)
    path = model or _model_path(served)
    asks = mix(requests, max_tokens, served["id"], served["max_model_len"])
    try:
        with console.status("loading the model and the SAE"):
            offline = Recomputation(description["sites"], path, sae, tolerance)
    except NeuroscopeError as error:
        raise VerifyError(str(error)) from None
    with Progress(console=console) as progress:
        sent = progress.add_task("requests answered", total=requests)
        checked = progress.add_task("recomputed", total=requests)
        outcomes = asyncio.run(
            storm(url.rstrip("/"), asks, concurrency, api_key, lambda: progress.advance(sent))
        )
        verdict = offline.verdict(outcomes, lambda: progress.advance(checked))
    if as_json:
        click.echo(msgspec.json.encode(verdict))
    else:
        _print_table(verdict, offline, description)
    context.exit(0 if verdict.clean else 1)


def ask_server(url: str, api_key: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is observed, and the model as vLLM lists it."""
    from neuroscope_vllm.cli.storm import CONNECT_TIMEOUT_S, VerifyError, refusal

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=CONNECT_TIMEOUT_S) as client:
            described = client.get("/v1/features/describe")
            models = client.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise VerifyError(
            f"no feature stream answers at {url} ({type(error).__name__}); start a server with"
            " `neuroscope serve`, or name its features port with --url."
        ) from None
    if described.status_code != 200:
        raise VerifyError(f"{url} is not a neuroscope server. {refusal(described).message}")
    description = described.json()
    if not description["armed"] or not description["sites"]:
        reasons = " ".join(description["problems"]) or "No worker has said that it is armed."
        raise VerifyError(f"the server at {url} does not observe its model: {reasons}")
    if models.status_code != 200:
        raise refusal(models)
    return description, models.json()["data"][0]


def _model_path(served: dict[str, Any]) -> str:
    from neuroscope_vllm.cli.storm import VerifyError

    path = served.get("root") or served["id"]
    if path.startswith((os.sep, ".")) and not os.path.isdir(path):
        raise VerifyError(
            f"the server runs the model in {path}, which is no folder on this machine; give the"
            " folder or hub id of the same model with --model."
        )
    return path


def _print_table(verdict: Verdict, offline: Recomputation, description: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    layers = ", ".join(map(str, offline.layers))
    grid = Table(title=f"{description['model']}, layer {layers}", show_header=False)
    grid.add_column()
    grid.add_column(justify="right")
    for name, value in msgspec.structs.asdict(verdict).items():
        shown = f"{value:.2g}" if isinstance(value, float) else str(value)
        if name in FAULTS:
            shown = f"[bold {'red' if value else 'green'}]{shown}[/]"
        grid.add_row(name.replace("_", " "), shown)
    grid.add_row("tolerance", f"{offline.tolerance:g}")
    grid.add_row("prompt tokens cached, without features", str(offline.cached))
    Console().print(grid)
