"""`neuroscope trace --check-ablations`: do weights rank what taking features out does?"""

from __future__ import annotations

import random
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from neuroscope_vllm.cli.corpus_options import take_corpus
from neuroscope_vllm.cli.demo import demo_model
from neuroscope_vllm.cli.supervise import console
from neuroscope_vllm.cli.trace_job import TraceJob
from neuroscope_vllm.core.errors import ConfigError

SAMPLES = 40
"""Of the text, at most."""
MIN_FIRED = 10
"""Tokens that a feature of either layer fires on, to be looked at: of fewer, a mean says little."""


def check(job: TraceJob, source: str, ablations: int) -> dict[str, Any]:
    """{"model", "layers", "corpus", "sequences", "tokens", "features", "ablated", "observation",
    "rows", "seconds"}. A row has the Spearman correlation of a `weighting` with an `effect`, over
    `all` pairs or those `together` in the observation: `within`, the median over the ablated
    features, and `pooled`, of all `pairs`.

    Raises NeuroscopeError, click.ClickException, one sentence each.
    """
    from neuroscope_vllm.core.causal.agreement import weightings
    from neuroscope_vllm.core.corpus import samples
    from neuroscope_vllm.engine.hf.effects import FeatureAblator

    began = time.monotonic()
    given = {**job.texts, "source": source}
    corpus = take_corpus({**given, "samples": min(given["samples"], SAMPLES)})
    if job.model is None:
        console.print("no MODEL given: the embedded demo")
    model = job.model or str(demo_model())
    with console.status("loading the model"):
        ablator = FeatureAblator(model, job.pair)
    with console.status("running the text"):
        sequences = list(samples(corpus, ablator.tokenizer))
        if not sequences:
            raise ConfigError(f"corpus {source} gave no sample; give one with running text.")
        survey = ablator.survey(sequences)
    features = _drawn(survey.lower.tolist(), ablations)
    with console.status("") as status:
        doing = iter(range(1, len(sequences) + 1))
        effects = ablator.measure(
            sequences,
            features,
            survey,
            lambda: status.update(f"taking features out, text {next(doing)} of {len(sequences)}"),
        )
    import torch

    firings, observation = job.measured or (None, None)
    predicted = weightings(job.pair, firings, torch.tensor(features))
    reached = (survey.upper >= MIN_FIRED)[None].expand(len(features), -1)
    return {
        "model": model,
        "layers": [job.pair.lower_layer, job.pair.upper_layer],
        "corpus": corpus.describe(),
        "sequences": len(sequences),
        "tokens": survey.tokens,
        "features": int(reached[0].sum()),
        "ablated": features,
        "observation": observation,
        "rows": _rows(predicted, effects._asdict(), reached),
        "seconds": round(time.monotonic() - began, 1),
    }


def _drawn(fired: list[int], wanted: int) -> list[int]:
    """Features to take out, ascending. Raises ConfigError: None fires often enough."""
    often = [feature for feature, tokens in enumerate(fired) if tokens >= MIN_FIRED]
    if not often:
        raise ConfigError(
            f"no feature of the earlier layer fires on {MIN_FIRED} tokens of the text for"
            " ablations; give more text."
        )
    return sorted(random.Random(0).sample(often, min(wanted, len(often))))


def _rows(predicted: dict[str, Any], effects: dict[str, Any], reached: Any) -> list[dict[str, Any]]:
    from neuroscope_vllm.core.causal.agreement import COFIRING, agreements

    counted = {"all": reached}
    if COFIRING in predicted:
        counted["together"] = reached & (predicted[COFIRING] > 0)
    return [
        {"pairs_of": name, "effect": effect, "weighting": weighting, **found._asdict()}
        for name, mask in counted.items()
        for effect, measured in effects.items()
        for weighting, found in agreements(predicted, measured, mask).items()
    ]


def print_check(found: dict[str, Any]) -> None:
    lower, upper = found["layers"]
    what = f"taking {len(found['ablated'])} features out of layer {lower}"
    title = f"Spearman's rank correlation with what {what} does to layer {upper}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("pairs", "effect on", "weighting", "within a feature", "of all pairs", "pairs"):
        table.add_column(name, justify="right" if name.endswith("pairs") else "left")
    for row in found["rows"]:
        shown = (
            f"{row[name]:+.3f}" if row[name] is not None else "" for name in ("within", "pooled")
        )
        table.add_row(row["pairs_of"], row["effect"], row["weighting"], *shown, f"{row['pairs']:,}")
    out = Console()
    out.print(table)
    out.print(
        f"{found['features']:,} features of layer {upper} fire often enough in {found['tokens']:,}"
        f" tokens of {found['corpus']}; {found['seconds']:.0f} s. Within a"
        " feature: the median over those taken out. Together: pairs that fired together where both"
        " layers were watched. cosine and co-firing use no encoder: they are what weights have to"
        " beat.",
        style="dim",
        markup=False,
        highlight=False,
    )
