"""`neuroscope bench`: what watching costs, measured here and now."""

from __future__ import annotations

import json
from typing import Any

import click

from neuroscope_vllm.cli.demo import VLLM_FLAGS, demo_model, demo_sae
from neuroscope_vllm.cli.options import neuroscope_flags, settings_from


@click.group("bench")
def command() -> None:
    """Measure what watching costs."""


@command.command("overhead", epilog="Everything after -- goes to both `vllm serve`.")
@neuroscope_flags
@click.option("--model", help="Model to serve (default: the demo model and its SAE).")
@click.option(
    "--batch", multiple=True, type=int, default=(1, 16), show_default=True, help="Concurrency."
)
@click.option("--tokens", default=128, show_default=True, help="Tokens generated per request.")
@click.option("--rounds", default=7, show_default=True, help="Alternations per batch size.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
def overhead(
    model: str | None,
    batch: tuple[int, ...],
    tokens: int,
    rounds: int,
    as_json: bool,
    vllm_flags: tuple[str, ...],
    **flags: Any,
) -> None:
    """Decode throughput and inter-token latency, with and without the plugin.

    Two servers run side by side, one plain and one observing every token of every request. Each
    round loads one and then the other, in alternating order; the figures are medians of the
    rounds' ratios.
    """
    from neuroscope_vllm.cli.overhead import compare, table

    if model is None:
        flags["sae"] = flags["sae"] or (str(demo_sae()),)
        model = str(demo_model())
        vllm_flags = (*VLLM_FLAGS, *vllm_flags)
    settings = settings_from(flags)
    if not settings.configured:
        raise click.UsageError("no SAE was given; name one with --sae.")
    report = compare(model, settings, batch, tokens, rounds, vllm_flags)
    if as_json:
        click.echo(json.dumps(report))
    else:
        table(report)
