"""`neuroscope trace`: what features of one layer do to those of a later one."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click

from neuroscope_vllm.cli.corpus_options import CORPUS_HELP, corpus_flags
from neuroscope_vllm.cli.drawing import drawable, write
from neuroscope_vllm.cli.engines import engine_flags
from neuroscope_vllm.cli.failures import failures
from neuroscope_vllm.core.json_text import to_json

BY = ("weight", "era", "twera")

HELP = f"""Trace what features of one layer do to those of a later one.

Needs no more than two SAEs of one model: the virtual weight from a feature of the earlier layer to
one of the later is the inner product of what the first one's decoder writes and what the other's
encoder reads. That is the direct path through the residual stream; what attention and MLPs between
the layers make of it is not in it.

Most pairs of features never fire together, and their weights mean nothing. With a MODEL and
--corpus, both layers are watched on the same text first, and edges are weighted by it:

\b
era    E[1(a_j > 0) a_i] x weight: what i adds to j, a token, where j fires
twera  E[a_i a_j] / E[a_j] x weight: the same where j fires, in proportion

Only excitation can be seen so: who keeps another silent does not fire with it. All firings are
kept, some kilobyte a token, and later commands about the same SAEs use them: see --samples. Special
tokens and attention sinks are left out.

\b
neuroscope trace --sae layer_12 --sae layer_20                 the strongest edges
neuroscope trace MODEL --sae … --sae … --corpus texts.jsonl    watch both, then
neuroscope trace --sae … --sae … --feature 20:4521             what feeds a feature
neuroscope trace --sae … --sae … --output map.html             a picture

A MODEL in a folder also tells which tokens each feature makes likelier and less likely.

{CORPUS_HELP}
"""


@click.command("trace", help=HELP, epilog="Everything after -- goes to vLLM untouched.")
@engine_flags
@click.option(
    "--feature",
    "asked",
    multiple=True,
    metavar="LAYER:INDEX",
    help="Only edges of this feature: inputs of one of the later layer, outputs of one of the"
    " earlier. May be given again.",
)
@click.option(
    "--top",
    default=20,
    show_default=True,
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="So many edges, of each --feature or in all.",
)
@click.option(
    "--by",
    type=click.Choice(BY),
    help="Which edges are strongest, of either sign (twera where both layers were watched, else"
    " weight).",
)
@click.option(
    "--max-cosine",
    type=click.FloatRange(-1, 1),
    metavar="X",
    help="Leave out pairs whose decoder directions have a larger cosine. Features of two layers"
    " often mean the same, and the residual stream merely keeps what the first one wrote; such"
    " pairs have the largest weights and tell nothing. 0.5 leaves most of them out.",
)
@corpus_flags(samples=500)
@click.option(
    "--check-ablations",
    metavar="CORPUS",
    help="Instead, take features out of the model over this text, which is best not --corpus's,"
    " measure what becomes of the later layer, and print how well each weighting ranks it.",
)
@click.option(
    "--ablations",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Features to take out, drawn at random of those that fire there.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the graph: .json, or a picture as .html, .png or .svg.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the graph as JSON on stdout.")
def command(
    asked: tuple[str, ...],
    top: int,
    by: str | None,
    max_cosine: float | None,
    check_ablations: str | None,
    ablations: int,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    features = [_feature(text) for text in asked]
    if max_cosine is not None and math.isnan(max_cosine):
        raise click.UsageError("--max-cosine nan is no number; give one from -1 to 1.")
    if features and check_ablations is not None:
        raise click.UsageError("--check-ablations draws its own features; leave --feature out.")
    if output is not None:
        with failures():
            drawable(output)
        if check_ablations is not None:
            raise click.UsageError("--check-ablations draws nothing; leave --output out.")
    # Before torch is loaded: see EngineSpec.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with failures():
        from neuroscope_vllm.cli.trace_job import TraceJob

        job = TraceJob(options)
        if check_ablations is not None:
            from neuroscope_vllm.cli.trace_check import check, print_check

            found = check(job, check_ablations, ablations)
            click.echo(to_json(found)) if as_json else print_check(found)
            return
        graph = job.graph(features, top, by, max_cosine)
    if as_json:
        click.echo(to_json(graph))
    else:
        from neuroscope_vllm.cli.trace_table import print_graph

        print_graph(graph)
    if output is not None:
        write(output, lambda form: _content(form, graph))


def _feature(text: str) -> tuple[int, int]:
    """Raises click.UsageError."""
    layer, colon, index = text.partition(":")
    if not (colon and layer.isdecimal() and index.isdecimal()):
        raise click.UsageError(f"--feature {text} is not LAYER:INDEX, as in 20:4521.")
    return int(layer), int(index)


def _content(form: str, graph: Any) -> bytes:
    if form == ".json":
        return f"{to_json(graph)}\n".encode()
    if form == ".html":
        from neuroscope_vllm.cli.trace_table import graph_page

        return graph_page(graph).encode(errors="replace")
    from neuroscope_vllm.cli.trace_picture import picture

    return picture(graph, form[1:])
