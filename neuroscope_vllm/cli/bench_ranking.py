"""`neuroscope bench ranking`: which order of a token's features is worth showing.

What is measured and the rule that picks are in `core.ranking_quality`.
"""

from __future__ import annotations

import json
import math
import os
import time
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.engines import DEMO, chosen, sae_flags
from neuroscope_vllm.cli.supervise import console
from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.errors import ConfigError, NeuroscopeError

if TYPE_CHECKING:
    from torch import Tensor

    from neuroscope_vllm.core.calibration import Calibration
    from neuroscope_vllm.core.config import Settings
    from neuroscope_vllm.core.corpus import Corpus
    from neuroscope_vllm.core.ranking_measures import Shown, Tokens
    from neuroscope_vllm.core.sae.sae import SAE
    from neuroscope_vllm.engine.hf.ablation import Ablator

Key = tuple[str, float, int]
"""A ranking, `max_frequency`, and k."""

FREQUENCIES = (0.5, 0.1, 0.01)
"""Values of `max_frequency`; the first is the one that picks."""
SIZES = (3, 8)
"""How many features are shown; likewise."""
PICKING = (FREQUENCIES[0], SIZES[0])
COLUMNS = {
    "label_fit": ("label fit", 3),
    "label_hits": ("hits", 3),
    "label_lift": ("lift", 1),
    "token_bits": ("token, bits", 2),
    "next_bits": ("next token, bits", 2),
    "kl_median": ("KL, median", 3),
    "kl_mean": ("KL, mean", 3),
    "kept": ("kept", 3),
    "explained": ("explained", 3),
    "distinct": ("distinct", 0),
    "shown": ("shown", 1),
}

HELP = """Compare the rankings of a token's features on text, and say which is best.

Runs CORPUS through MODEL with transformers, by default the embedded demo, and judges the first
3 and 8 features of each token by how often their labels are right for it, what they tell of the
token and the next one, what the model does without them, how they change from token to token, and
how much of the residual they explain. Needs the SAE's calibration and its `tokens` labels.

Take text that neither the SAE nor its labels were made from: a .txt, .jsonl or .parquet file, a
folder, or a dataset of the Hugging Face hub. Each sample counts as a document of its own; so give
one row a document, and no longer than --max-tokens.
"""


@click.command("ranking", short_help="Compare the rankings of a token's features.", help=HELP)
@click.argument("model", required=False)
@sae_flags
@click.option("--corpus", "source", required=True, help="Text to read.", metavar="CORPUS")
@click.option("--samples", default=1000, show_default=True, type=click.IntRange(8))
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(16))
@click.option(
    "--ablations",
    default=500,
    show_default=True,
    type=click.IntRange(8),
    help="Tokens on which features are taken out of the model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def command(
    model: str | None,
    source: str,
    samples: int,
    max_tokens: int,
    ablations: int,
    as_json: bool,
    **flags: Any,
) -> None:
    from neuroscope_vllm.core.corpus import Corpus

    corpus = Corpus(source=source, samples=samples, max_tokens=max_tokens)
    model, settings = chosen(model or DEMO, flags)
    try:
        report = compare(model, settings, corpus, ablations)
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print(report)


def compare(model: str, settings: Settings, corpus: Corpus, ablations: int) -> dict[str, Any]:
    """{"model", "sae", "layer", "corpus", "documents", "tokens", "ablated_tokens", "seconds",
    "rows", "best", "ahead_by"}. A row is a ranking, `random` among them, at one `max_frequency` and
    `k`, with [value, low, high] of each of COLUMNS; `best` is None if no ranking is eligible, and
    `ahead_by` has by how much its label fit exceeds that of each other.

    Raises click.ClickException and NeuroscopeError, one sentence each.
    """
    # Before torch is loaded: see cli.engines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from neuroscope_vllm.core.corpus import samples
    from neuroscope_vllm.core.ranking_measures import Bootstrap, LabelFit, interval
    from neuroscope_vllm.core.ranking_quality import RANDOM, Judge, gather, verdict
    from neuroscope_vllm.core.sae.observed import named

    began = time.monotonic()
    settings = named(settings, model)
    if len(settings.sae) != 1:
        raise click.UsageError("rankings are compared on one SAE; give one --sae.")
    (address,) = settings.sae
    labels = _labels(address)
    layer, sae, ablator = _open(model, settings)
    calibration = _calibration(address, sae)
    with console.status("running the corpus"):
        sequences = list(samples(corpus, ablator.tokenizer))
        special = ablator.tokenizer.all_special_ids
        tokens = gather(sae, sequences, ablator.residual, special, calibration.sink_norm)
    rankings = _shown(tokens, calibration)
    boot = Bootstrap(len(sequences))
    decode = ablator.tokenizer.decode
    fit = LabelFit(labels, tokens, lambda token_id: decode([token_id]), sae.width)
    judge = Judge(tokens, sae, calibration, fit, boot)
    rows, kl = _ablated(rankings, tokens, sequences, sae, ablator, ablations)
    figures = {}
    with console.status("") as status:
        for number, (key, shown) in enumerate(rankings.items()):
            status.update(f"judging {key[0]}, {number + 1} of {len(rankings)}")
            figures[key] = judge.of(shown) | {
                "kl_median": boot.median(tokens.document[rows], kl[key]),
                "kl_mean": boot.mean(tokens.document[rows], kl[key]),
            }
    picking = {key[0]: found for key, found in figures.items() if key[1:] == PICKING}
    fits = {name: found["label_fit"] for name, found in picking.items() if name != RANDOM}
    best = verdict(fits, {name: found["kl_median"] for name, found in picking.items()})
    return {
        "model": model,
        "sae": address,
        "layer": layer,
        "corpus": corpus.describe(),
        "documents": len(sequences),
        "tokens": len(tokens.document),
        "ablated_tokens": len(rows),
        "seconds": round(time.monotonic() - began, 1),
        "rows": [
            {"ranking": name, "max_frequency": frequency, "k": k}
            | {measure: interval(found[measure]) for measure in COLUMNS}
            for (name, frequency, k), found in figures.items()
        ],
        "best": best,
        "ahead_by": {
            name: interval(fits[best] - found) for name, found in fits.items() if name != best
        }
        if best
        else {},
    }


def _open(model: str, settings: Settings) -> tuple[int, SAE, Ablator]:
    from neuroscope_vllm.core.sae import check_fits, load_sae
    from neuroscope_vllm.core.sae.info import check_served
    from neuroscope_vllm.core.sae.observed import observed
    from neuroscope_vllm.engine.hf.ablation import Ablator

    ((layer, info),) = observed(settings).items()
    check_served(info)
    with console.status("loading the model and the SAE"):
        ablator = Ablator(model, layer)
        check_fits(info, d_model=ablator.d_model, num_layers=ablator.num_layers, layer=layer)
        sae = load_sae(settings.sae[0])
    return layer, sae.reading_rms() if settings.sae_input == "rms" else sae, ablator


def _calibration(address: str, sae: SAE) -> Calibration:
    from neuroscope_vllm.core.calibration import Calibration

    path = artefacts.find_calibration(address)
    if path is None:
        raise ConfigError(
            f"SAE {address} has no calibration, which rankings need; make one with"
            " `neuroscope calibrate`."
        )
    calibration = Calibration.load(path)
    if calibration.width != sae.width:
        raise ConfigError(
            f"calibration {path} has {calibration.width} features but the SAE has {sae.width};"
            " make it again with `neuroscope calibrate`."
        )
    return calibration


def _labels(address: str) -> dict[int, str]:
    from neuroscope_vllm.core.labels import load_labels
    from neuroscope_vllm.core.token_labels import LABELLER

    path = next((p for p in artefacts.find_labels(address) if p.stem == LABELLER), None)
    if path is None:
        raise ConfigError(
            f"SAE {address} has no labels of the labeller {LABELLER}, which alone can be checked"
            " against a text; `neuroscope labels list` shows what there is."
        )
    return {label.index: label.text for label in load_labels(path)}


def _shown(tokens: Tokens, calibration: Calibration) -> dict[Key, Shown]:
    from neuroscope_vllm.core.ranking import RANKINGS, make_ranker
    from neuroscope_vllm.core.ranking_quality import RANDOM, shown_by

    found = {}
    for frequency in FREQUENCIES:
        for name in (*RANKINGS, RANDOM):
            method = "activation" if name == RANDOM else name
            ranker = make_ranker(method, calibration, frequency)
            for k in SIZES:
                shown = shown_by(ranker, tokens, k, at_random=name == RANDOM)
                found[name, frequency, k] = shown
    return found


def _ablated(
    rankings: dict[Key, Shown],
    tokens: Tokens,
    sequences: list[list[int]],
    sae: SAE,
    ablator: Ablator,
    number: int,
) -> tuple[Tensor, dict[Key, Tensor]]:
    """(rows drawn evenly int64 [r], KL of each ranking there float64 [r])."""
    import torch
    from rich.progress import track

    from neuroscope_vllm.core.ranking_quality import ablate

    draw = torch.randperm(len(tokens.document), generator=torch.Generator().manual_seed(0))
    rows = draw[:number].sort().values
    found = []
    for row in track(rows.tolist(), "taking features out", console=console, transient=True):
        until = int(tokens.position[row]) + 1
        context = sequences[int(tokens.document[row])][:until]
        run = partial(ablator.next_logits, context)
        found.append(ablate(list(rankings.values()), tokens, row, sae, run))
    return rows, dict(zip(rankings, torch.stack(found, dim=1), strict=True))


def _print(report: dict[str, Any]) -> None:
    """In Markdown, so that it can be taken into a page."""
    click.echo(
        f"{report['documents']:,} documents of {report['corpus']}: {report['tokens']:,} tokens,"
        f" {report['ablated_tokens']:,} of them ablated; {report['seconds']:,.0f} s."
        " Intervals of 95 % over documents."
    )
    for frequency, k in product(FREQUENCIES, SIZES):
        table = [["ranking", *(title for title, _ in COLUMNS.values())]]
        for row in report["rows"]:
            if (row["max_frequency"], row["k"]) == (frequency, k):
                cells = (_figure(row[name], digits) for name, (_, digits) in COLUMNS.items())
                table.append([row["ranking"], *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        click.echo(f"\nThe first {k}, max_frequency {frequency:g}:\n")
        for cells in table:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            click.echo(f"| {' | '.join(padded)} |")
    if report["best"] is None:
        click.echo("\nNo ranking shows what matters more to the model than features at random.")
        return
    click.echo(f"\nBest: {report['best']}. Its label fit is ahead by:")
    for name, (lead, low, high) in report["ahead_by"].items():
        click.echo(f"  {lead:+.4f} ({low:+.4f} to {high:+.4f}) of {name}")


def _figure(interval: tuple[float, float, float], digits: int) -> str:
    value, low, high = interval
    if low == high or math.isnan(value):
        return f"{value:,.{digits}f}"
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"
