"""`neuroscope bench`: what watching and encoding cost, measured here and now."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from neuroscope_vllm.cli.bench_ranking import command as ranking
from neuroscope_vllm.cli.bench_report import Sizes, deliver, report_flags, together
from neuroscope_vllm.cli.bench_shapes import GEMMA_2_2B
from neuroscope_vllm.cli.corpus_options import corpus_flags, take_corpus
from neuroscope_vllm.cli.engines import DEMO, chosen, sae_flags
from neuroscope_vllm.cli.failures import in_a_sentence
from neuroscope_vllm.cli.machine import machine
from neuroscope_vllm.cli.options import api_key_option, neuroscope_flags

ROUNDS = "Repetitions per batch size."


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


_VLLM_FLAGS = click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)


def _batches(*default: int) -> Callable[..., Any]:
    return click.option(
        "--batch",
        "batches",
        type=Sizes(),
        multiple=True,
        default=[",".join(map(str, default))],
        callback=together,
        show_default=True,
        help="Concurrent requests, as in 1,8,32.",
    )


@command.command(
    "overhead",
    short_help="What the plugin costs in throughput and latency.",
    epilog="Everything after -- goes to each `vllm serve`.",
)
@neuroscope_flags
@click.option("--model", help="Model to serve (default: the demo model and its SAE).")
@click.option(
    "--shape",
    type=click.Choice([GEMMA_2_2B]),
    help="Serve a model of this shape with random weights and a random SAE: needs no downloads.",
)
@_batches(1, 16)
@click.option("--tokens", default=128, show_default=True, help="Tokens generated per request.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help=ROUNDS)
@click.option(
    "--steered",
    type=Share(),
    default="none",
    show_default=True,
    help="Share of the observed server's requests that steer, each by a feature of its own.",
)
@click.option("--idle", is_flag=True, help="Also a server whose plugin is not configured.")
@report_flags
@_VLLM_FLAGS
def overhead(
    model: str | None,
    shape: str | None,
    batches: tuple[int, ...],
    tokens: int,
    rounds: int,
    steered: float,
    idle: bool,
    as_json: str | None,
    plot: Path | None,
    vllm_flags: tuple[str, ...],
    **flags: Any,
) -> None:
    """Decode throughput and inter-token latency, with and without the plugin.

    Servers run side by side, one that does not load the plugin and one observing every token of
    every request. Each round loads one after the other, in alternating order; the figures are
    medians of the rounds' ratios. On a GPU they share its memory evenly.
    """
    from neuroscope_vllm.cli.bench_overhead import compare, draw, table
    from neuroscope_vllm.cli.bench_servers import served

    with served(model, shape, flags, vllm_flags) as (name, settings, words):
        report = compare(name, settings, batches, tokens, rounds, words, steered, idle)
    deliver(report | {"shape": shape}, as_json, plot, table, draw)


@command.command(
    "latency",
    short_help="From a chat's chunk to its feature event.",
    epilog="Everything after -- goes to `vllm serve`.",
)
@neuroscope_flags
@click.option("--url", help="Chat API of a running server (default: serve the demo).")
@click.option("--features-url", help="Its feature stream.")
@api_key_option
@_batches(1, 16)
@click.option("--tokens", default=64, show_default=True, help="Tokens generated per chat.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1), help=ROUNDS)
@report_flags
@_VLLM_FLAGS
def latency(
    url: str | None,
    features_url: str | None,
    api_key: str | None,
    batches: tuple[int, ...],
    tokens: int,
    rounds: int,
    as_json: str | None,
    plot: Path | None,
    vllm_flags: tuple[str, ...],
    **flags: Any,
) -> None:
    """How long after a chat's chunk the feature event of its token comes.

    Chats and feature streams are read in one process by one clock, which stamps each piece as it
    leaves its socket.
    """
    from neuroscope_vllm.cli.bench_latency import draw, measure, table
    from neuroscope_vllm.cli.bench_servers import serving

    if (url is None) != (features_url is None):
        raise click.UsageError("give --url and --features-url together, or neither.")
    if tokens < 3:
        raise click.UsageError("--tokens is too few to compare; give at least 3.")
    with contextlib.ExitStack() as running:
        if url is None or features_url is None:
            url, features_url = running.enter_context(serving(flags, vllm_flags))
            api_key = None
        url, features_url = url.rstrip("/"), features_url.rstrip("/")
        report = measure(url, features_url, batches, tokens, rounds, api_key)
    deliver(report | {"machine": machine()}, as_json, plot, table, draw)


@command.command("hub", short_help="One side process under load.")
@click.option(
    "--events-per-second",
    default=10_000,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Token events that the engine makes.",
)
@click.option(
    "--readers",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="SSE connections, and requests at once.",
)
@click.option(
    "--seconds",
    default=600,
    show_default=True,
    type=click.FloatRange(1, 18_000),
    help="How long the load lasts.",
)
@click.option(
    "--follow",
    type=click.Choice(["own", "all"]),
    default="own",
    show_default=True,
    help="What a reader reads: requests of its own, one after the other, or all there are.",
)
@click.option(
    "--memory-mb",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="The hub's setting of that name.",
)
@click.option(
    "--ring-mb",
    type=click.IntRange(1),
    help="Likewise: of it, for the stream of all requests (a quarter).",
)
@click.option(
    "--against",
    type=click.Choice(["sse-starlette"]),
    help="Then have a plain broadcaster send the same events.",
)
@report_flags
def hub(as_json: str | None, plot: Path | None, against: str | None, **load: Any) -> None:
    """One side process under load: what it takes, what its readers get, what it costs.

    A fake engine speaks to it over the real socket, as many requests at once as there are readers,
    each of which is an SSE connection. Exits with 1 unless, for each reader, events published are
    events received and those that gaps told of. Each reader takes an open file at both ends
    (`ulimit -n`).
    """
    from neuroscope_vllm.cli.bench_hub import Load, balanced, draw, measure, table

    report = measure(Load(**load), against) | {"machine": machine()}
    deliver(report, as_json, plot, table, draw)
    if not balanced(report):
        raise click.exceptions.Exit(1)


@command.command("encode", short_help="The encoder, against what the device allows.")
@click.option(
    "--width",
    "widths",
    type=Sizes(),
    multiple=True,
    default=["16384"],
    callback=together,
    show_default=True,
    help="Features, as in 16384,65536.",
)
@click.option(
    "--rows",
    type=Sizes(),
    multiple=True,
    default=["1,8,16,32,128,2048"],
    callback=together,
    show_default=True,
    help="Tokens of a step.",
)
@click.option(
    "--d-model",
    default=2304,
    show_default=True,
    type=click.IntRange(min=1),
    help="Width of the residual.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where it is measured.",
)
@report_flags
def encode(
    widths: tuple[int, ...],
    rows: tuple[int, ...],
    d_model: int,
    device: str,
    as_json: str | None,
    plot: Path | None,
) -> None:
    """The encoder alone, with a random SAE, against what the device's memory and arithmetic allow.

    Both limits are measured in the same run, by a large copy and a large matmul.
    """
    from neuroscope_vllm.cli.bench_encode import draw, measure, table

    report = measure(widths, rows, d_model, device) | {"machine": machine()}
    deliver(report, as_json, plot, table, draw)


@command.command("memory", short_help="Time and memory that encoding takes.")
@click.option("--width", default=16384, show_default=True, type=click.IntRange(min=8))
@click.option("--rows", default=8192, show_default=True, type=click.IntRange(min=1))
@click.option("--d-model", default=2304, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def memory(width: int, rows: int, d_model: int, as_json: bool) -> None:
    """Time and memory that encoding takes, with a random SAE, on the GPU if there is one.

    Memory is the peak beyond the SAE's own weights and the rows. What the encoder of a server adds
    to it includes its second copy of the encoder's weights, for the selection.
    """
    from neuroscope_vllm.cli.bench_memory import measure, table

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
    from neuroscope_vllm.cli.bench_corpus import compare, table

    with in_a_sentence():
        read = take_corpus(options)
        model, settings = chosen(model or DEMO, options)
        report = compare(model, settings, read, rounds, vllm_flags)
    if as_json:
        click.echo(json.dumps(report))
    else:
        table(report)


command.add_command(ranking)
