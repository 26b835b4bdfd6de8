"""Measure an SAE on text of sources that training never saw, beside two controls of its L0.

Usage: `python evaluate.py --sae FOLDER --layer 20 --acts FOLDER --tokens FOLDER --model FOLDER`

Writes `metrics.json` beside the SAE.
"""

import argparse
import json
from pathlib import Path

import measure
import torch
from collect import shards
from corpus import HELD_OUT_PART, NAMES, SEED, learnable, load
from sae_lens import SAE
from train import KEEP_PREFIX, training_shards
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLE_SHARDS = 40
"""Of training, spread over it: 1.3 million tokens to find dead features in."""
FIT_TOKENS = 200_000
"""To find the controls' directions and scale."""
LOSS_ROWS = 128


def training_sample(args: argparse.Namespace, tokenizer, cut: float) -> torch.Tensor:
    """Residuals [n, d_model] of training, bf16."""
    found = training_shards(args.tokens, args.acts, args.layer)
    parts = []
    for shard in found[:: max(1, len(found) // SAMPLE_SHARDS)]:
        acts = shard.read(args.layer)
        mask = learnable(shard.tokens, tokenizer, keep_prefix=KEEP_PREFIX)
        parts.append(acts[measure.without_sinks(acts, mask, cut)])
    return torch.cat(parts)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--sae", "--acts", "--tokens", "--model"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    args = parser.parse_args()
    sae = SAE.load_from_disk(args.sae)  # what is reported is what is stored
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    cut = sae.cfg.metadata.sink_norm_cut

    held_out = load(args.tokens, HELD_OUT_PART)
    rows = held_out["tokens"].long()
    acts = torch.cat(
        [one.read(args.layer) for one in shards(args.tokens, args.acts, HELD_OUT_PART, args.layer)]
    )
    wanted = learnable(rows, tokenizer)
    mask = measure.without_sinks(acts, wanted, cut)
    result: dict = {"held_out": {"all": measure.metrics(sae, acts[mask])}}
    sinks = wanted & ~mask
    result["sinks"] = {"found": int(sinks.sum()), "first_of_row": int(sinks[:, 0].sum())}
    for index, name in enumerate(NAMES):
        if (of := held_out["source"] == index).any():
            result["held_out"][name] = measure.metrics(sae, acts[of][mask[of]])

    sample = training_sample(args, tokenizer, cut)
    rate = measure.firings(sae, sample) / len(sample)
    result["features"] = {
        "tokens": len(sample),
        "dead": int((rate == 0).sum()),
        "rarer_than_1_in_100000": int((rate < 1e-5).sum()),
        "more_frequent_than_1_in_10": int((rate > 0.1).sum()),
        "median_rate": float(rate.median()),
    }
    k = round(result["held_out"]["all"]["l0"])
    generator = torch.Generator().manual_seed(SEED)
    fit = sample[torch.randperm(len(sample), generator=generator)[:FIT_TOKENS]].float()
    compared = {
        "sae": sae,
        "pca": measure.Dictionary.of_principal_components(fit, k),
        "random": measure.Dictionary.of_random_directions(fit, sae.cfg.d_sae, k),
    }
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    some = torch.randperm(len(rows), generator=generator)[:LOSS_ROWS]
    losses = measure.Losses(model, args.layer, rows[some], mask[some])
    result["compared"] = {
        name: measure.metrics(one, acts[mask]) | {"loss_recovered": losses.recovered(one)}
        for name, one in compared.items()
    }
    result["losses"] = {"model": losses.clean, "zeroed": losses.zeroed}
    print(json.dumps(result, indent=2))
    (args.sae / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
