"""`neuroscope bench`: what watching and encoding cost, measured here and now."""

from __future__ import annotations

import json
from typing import Any

import click

from neuroscope_vllm.cli.corpus_options import corpus_flags, take_corpus
from neuroscope_vllm.cli.demo import SERVER_FLAGS, demo_model, demo_sae
from neuroscope_vllm.cli.engines import DEMO, chosen, sae_flags
from neuroscope_vllm.cli.failures import in_a_sentence
from neuroscope_vllm.cli.options import neuroscope_flags, settings_from
from neuroscope_vllm.cli.ranking_quality import command as ranking


class Share(click.ParamType[float]):
    """all, none or a number from 0 to 1."""

    name = "all|none|SHARE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        share = {"all": 1.0, "none": 0.0}.get(value)
        if share is None:
            share = click.FLOAT.convert(value, param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{value} is not all, none or a number from 0 to 1.", param, ctx)
        return share


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
@click.option(
    "--steered",
    type=Share(),
    default="none",
    show_default=True,
    help="Share of the observed server's requests that steer, each by a feature of its own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
def overhead(
    model: str | None,
    batch: tuple[int, ...],
    tokens: int,
    rounds: int,
    steered: float,
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
        vllm_flags = (*SERVER_FLAGS, *vllm_flags)
    settings = settings_from(flags)
    if not settings.configured:
        raise click.UsageError("no SAE was given; name one with --sae.")
    report = compare(model, settings, batch, tokens, rounds, vllm_flags, steered)
    if as_json:
        click.echo(json.dumps(report))
    else:
        table(report)


@command.command("encode")
@click.option("--width", default=16384, show_default=True, type=click.IntRange(min=8))
@click.option("--rows", default=8192, show_default=True, type=click.IntRange(min=1))
@click.option("--d-model", default=2304, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def encode(width: int, rows: int, d_model: int, as_json: bool) -> None:
    """Time and memory that encoding takes, with a random SAE, on the GPU if there is one.

    Memory is the peak beyond the SAE's own weights and the rows. What the encoder of a server adds
    to it includes its second copy of the encoder's weights, for the selection.
    """
    from neuroscope_vllm.cli.encode_cost import measure, table

    report = measure(width, rows, d_model)
    if as_json:
        click.echo(json.dumps(report))
    else:
        table(report)


@command.command("corpus", epilog="Everything after -- goes to vLLM.")
@click.argument("model", required=False)
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
@sae_flags
@corpus_flags(samples=300)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def corpus(
    model: str | None,
    vllm_flags: tuple[str, ...],
    rounds: int,
    as_json: bool,
    **options: Any,
) -> None:
    """How fast `collect` reads a corpus.

    Against vLLM's own prefill of the whole model, and against a loop over transformers and SAELens
    that is cut off at the same layer: on the same samples and cores, in turn. SAELens has to be
    installed, and to read the SAE.
    """
    from neuroscope_vllm.cli.corpus_speed import compare, table

    with in_a_sentence():
        read = take_corpus(options)
        model, settings = chosen(model or DEMO, options)
        report = compare(model, settings, read, rounds, vllm_flags)
    if as_json:
        click.echo(json.dumps(report))
    else:
        table(report)


command.add_command(ranking)
