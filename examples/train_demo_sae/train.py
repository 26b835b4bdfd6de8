"""Train the demo's SAE with SAELens on collected residuals, calibrate, measure and save it.

Usage: `python train.py --acts FOLDER --tokens tokens.safetensors --model FOLDER --out FOLDER`
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import measure
import sae_lens
import torch
from collect import LAYER, ROWS_PER_SHARD, stream
from corpus import SAMPLED, SEED, SEQ_LEN, SOURCES, learnable
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from safetensors.torch import load_file, save_file
from torch import nn

BATCH = 1024
MIX_SHARDS = 4  # shuffled together: about 120,000 tokens
LEARNING_RATE = 8e-4
KEEP_PREFIX = 8  # learn the template's system prompt from every 8th chat


class FastBatchTopK(nn.Module):
    """SAELens's BatchTopK with a k-th value in place of a sort: the same, faster on CPU."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: torch.Tensor) -> torch.Tensor:
        """Pre-activations [n, d_sae] to activations, `k` a row on average over the batch."""
        acts = pre.relu()
        flat = acts.detach().flatten()
        kth = flat.kthvalue(flat.numel() - int(self.k * len(acts))).values
        return acts * (acts > kth)


class FastBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    def get_activation_fn(self) -> nn.Module:
        return FastBatchTopK(self.cfg.k)


@dataclass
class Residuals:
    """The training residuals in the order of the corpus, without sinks and repeated prompts."""

    folder: Path
    tokens: torch.Tensor  # [n_seq, SEQ_LEN]
    mask: torch.Tensor  # [n_seq, SEQ_LEN] bool
    cut: float = math.inf

    @property
    def n_batches(self) -> int:
        """Batches of one pass: a little less than the mask says, since sinks are not known yet."""
        return int(self.mask.sum() * 0.995) // BATCH

    def shards(self) -> Iterator[torch.Tensor]:
        """Residuals [n, d_model] of one shard after the other, bf16."""
        masks = self.mask.split(ROWS_PER_SHARD)
        for acts, mask in zip(stream(self.folder, "train", len(self.tokens)), masks, strict=True):
            yield acts[measure.without_sinks(acts, mask, self.cut)]

    def sample(self, n_shards: int = MIX_SHARDS) -> torch.Tensor:
        """The first shards, [n, d_model]."""
        return torch.cat(list(itertools.islice(self.shards(), n_shards)))

    def batches(self) -> Iterator[torch.Tensor]:
        """Float32 batches [BATCH, d_model] of one pass, shuffled over a few shards at a time."""
        generator = torch.Generator().manual_seed(SEED)
        shards = self.shards()
        rest = torch.empty(0)
        while group := list(itertools.islice(shards, MIX_SHARDS)):
            acts = torch.cat([rest.to(group[0]).reshape(-1, group[0].shape[1]), *group])
            acts = acts[torch.randperm(len(acts), generator=generator)]
            whole = len(acts) // BATCH * BATCH
            yield from (batch.float() for batch in acts[:whole].split(BATCH))
            rest = acts[whole:]


def fit(data: Residuals, width: int, k: float, checkpoints: Path | None) -> BatchTopKTrainingSAE:
    """Train in one pass with SAELens's trainer."""
    torch.manual_seed(SEED)
    sample = data.sample().float()
    d_in = sample.shape[1]
    sae = FastBatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_in, d_sae=width, k=k, normalize_activations="expected_average_only_in"
        )
    )
    steps = data.n_batches
    config = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 4,
        dead_feature_window=400,
        autocast=True,
        n_checkpoints=8 if checkpoints else 0,
        checkpoint_path=str(checkpoints) if checkpoints else None,
    )
    trainer = SAETrainer(config, sae, data.batches())
    # Set here, not estimated by the trainer, so that the bias can start at the mean in its units.
    scale = math.sqrt(d_in) / float(sample.norm(dim=-1).mean())
    trainer.activation_scaler.scaling_factor = scale
    sae.b_dec.data = sample.mean(0) * scale
    return trainer.fit()


@torch.no_grad()
def finish(trained: BatchTopKTrainingSAE, acts: torch.Tensor, k: float) -> SAE:
    """The SAE as it will be stored: JumpReLU on raw residuals, bf16 matrices, exact threshold.

    The moving-average threshold of training lags, so it is replaced by one calibrated on
    training residuals with the rounded weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        sae = SAE.load_from_disk(folder)
    sae.b_enc.data -= sae.b_dec @ sae.W_enc  # b_dec is no longer subtracted from the input
    sae.cfg.apply_b_dec_to_input = False
    for matrix in (sae.W_enc, sae.W_dec):
        matrix.data = matrix.bfloat16().float()
    sae.threshold.data.zero_()
    chosen = torch.randperm(len(acts), generator=torch.Generator().manual_seed(SEED))[:16384]
    measure.calibrate_threshold(sae, acts[chosen], k)
    return sae


def save(sae: SAE, folder: Path, metadata: dict) -> None:
    """SAELens's two files; the matrices in bf16, the vectors in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    sae.cfg.metadata = sae_lens.saes.sae.SAEMetadata(**metadata)
    sae.cfg.device = "cpu"
    (folder / "cfg.json").write_text(json.dumps(sae.cfg.to_dict(), indent=2) + "\n")
    weights = {name: value.contiguous() for name, value in sae.state_dict().items()}
    weights |= {name: weights[name].bfloat16() for name in ("W_enc", "W_dec")}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "sae_weights.safetensors").chmod(0o644)  # safetensors makes it private


def held_out_metrics(
    sae: SAE, acts: torch.Tensor, mask: torch.Tensor, tokens: dict[str, torch.Tensor], bos: int
) -> dict[str, dict]:
    """Metrics over all held-out tokens and by the form of their text."""
    chat, sampled = tokens["held_out"][:, 0] == bos, tokens["held_out_source"] == len(SOURCES)
    parts = {"all": chat | ~chat, "plain": ~chat, "chat": chat & ~sampled, SAMPLED: sampled}
    return {
        name: measure.metrics(sae, acts[rows][mask[rows]])
        for name, rows in parts.items()
        if rows.any()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--acts", "--tokens", "--model", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=float, default=56)
    parser.add_argument("--checkpoints", type=Path)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer, tokens = AutoTokenizer.from_pretrained(args.model), load_file(args.tokens)
    mask = learnable(tokens["train"], tokenizer, keep_prefix=KEEP_PREFIX)
    data = Residuals(args.acts, tokens["train"], mask)
    first = next(stream(args.acts, "train", len(mask)))
    median, data.cut = measure.sink_cut(first, mask[: len(first)])
    print(f"median norm {median:.1f}, sink cut {data.cut:.1f}", flush=True)

    start = time.monotonic()
    trained = fit(data, args.width, args.k, args.checkpoints)
    print(f"trained in {time.monotonic() - start:.0f} s", flush=True)
    sae = finish(trained, data.sample(), args.k)
    metadata = {
        "model_name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hook_name": f"blocks.{LAYER}.hook_resid_post",
        "context_size": SEQ_LEN,
        "prepend_bos": False,
        "exclude_special_tokens": True,
        "sink_norm_median": round(median, 2),
        "sink_norm_cut": round(data.cut, 2),
        "training_tokens": data.n_batches * BATCH,
        "seed": SEED,
        "sae_lens_version": sae_lens.__version__,
    }
    save(sae, args.out, metadata)

    stored = SAE.load_from_disk(args.out)  # what is reported is what is stored
    held_out = torch.cat(list(stream(args.acts, "held_out", len(tokens["held_out"]))))
    mask = measure.without_sinks(held_out, learnable(tokens["held_out"], tokenizer), data.cut)
    result = held_out_metrics(stored, held_out, mask, tokens, tokenizer.bos_token_id)
    sample = data.sample(16)
    rate = measure.firings(stored, sample) / len(sample)
    result["features"] = {
        "tokens": len(sample),
        "dead": int((rate == 0).sum()),
        "rarer_than_1_in_100000": int((rate < 1e-5).sum()),
        "more_frequent_than_1_in_10": int((rate > 0.1).sum()),
        "median_rate": float(rate.median()),
    }
    print(json.dumps(result, indent=2))
    (args.out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
