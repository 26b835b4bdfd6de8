"""The features that stand most often among the strongest of a chat's tokens: those to label first.

Usage: `python chat_features.py --sae FOLDER --layer 20 --acts FOLDER --tokens FOLDER --model FOLDER
--n 330 --out features.json`

By z-score, as a server ranks them, over a sixth of the model's own chats.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import measure
import torch
from collect import Shard, shards
from corpus import CHATS, learnable
from sae_lens import SAE
from train import training_shards
from transformers import AutoTokenizer

ROWS = 128  # of a shard
TOP_K, MAX_FREQUENCY = 8, 0.5  # as a server has them
STATISTICS_STRIDE, CHAT_STRIDE = 40, 6  # shards


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--sae", "--acts", "--tokens", "--model", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--n", type=int, required=True)
    args = parser.parse_args()
    sae = SAE.load_from_disk(args.sae)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encoded(shard: Shard) -> Iterator[torch.Tensor]:
        acts = shard.read(args.layer)[:ROWS]
        mask = learnable(shard.tokens[:ROWS], tokenizer)
        chosen = measure.without_sinks(acts, mask, sae.cfg.metadata.sink_norm_cut)
        yield from (sae.encode(x.float()) for x in acts[chosen].split(4096))

    n, total, square, fired = 0, *torch.zeros(3, sae.cfg.d_sae)
    for shard in training_shards(args.tokens, args.acts, args.layer)[::STATISTICS_STRIDE]:
        for f in encoded(shard):
            n, total, square = n + len(f), total + f.sum(0), square + f.square().sum(0)
            fired += (f > 0).sum(0)
    mean = total / n
    std = (square / n - mean.square()).clamp_min(1e-9).sqrt()

    tokens, places = 0, torch.zeros(sae.cfg.d_sae)
    for shard in shards(args.tokens, args.acts, CHATS, args.layer)[::CHAT_STRIDE]:
        for f in encoded(shard):
            shown = (f > 0) & (fired / n < MAX_FREQUENCY)
            best = torch.where(shown, (f - mean) / std, -1.0).topk(TOP_K, dim=-1)
            places += torch.bincount(best.indices[best.values > 0], minlength=len(places))
            tokens += len(f)
    order = places.argsort(descending=True)[: args.n].tolist()
    share = float(places[order].sum() / places.sum())
    print(f"{len(order)} features hold {share:.0%} of the places of {tokens:,} tokens")
    args.out.write_text(json.dumps(order) + "\n")


if __name__ == "__main__":
    main()
