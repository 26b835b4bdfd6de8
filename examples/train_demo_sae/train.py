"""Train an SAE of one layer with SAELens on collected residuals, calibrate its threshold, save it.

Usage: `python train.py --acts FOLDER --tokens FOLDER --model FOLDER --out FOLDER --width 8192
--checkpoints FOLDER`
"""

import argparse
import copy
import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import measure
import sae_lens
import torch
from collect import LAYER, Shard, shards
from corpus import CHATS, DOCUMENTS, SEED, SEQ_LEN, learnable
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

BATCH = 1024
MIX_SHARDS = 4  # shuffled together: about 120,000 tokens
SAMPLE_STRIDE = 61
SPREAD_SHARDS = 8  # of all of training, for the threshold
LEARNING_RATE = 8e-4
CHECKPOINTS = 20
KEEP_PREFIX = 8  # learn the template's system prompt from every 8th chat


class FastBatchTopK(nn.Module):
    """SAELens's BatchTopK with a k-th value in place of a sort: the same, faster on CPU."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: torch.Tensor) -> torch.Tensor:
        """Pre-activations [n, d_sae] to activations, `k` a row on average over the batch."""
        acts = pre.relu()
        return acts * (acts > next_largest(acts.detach().flatten(), int(self.k * len(acts))))


def next_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The largest of `values` [n] after the `k` largest. Looked for among a few only: those above
    what a sample says will do."""
    sample = values[::SAMPLE_STRIDE]
    kept = min(int(1.25 * k / SAMPLE_STRIDE) + 64, len(sample) - 1)
    few = values[values > sample.kthvalue(len(sample) - kept).values]
    found = few if len(few) > k else values
    return found.kthvalue(len(found) - k).values


class FastBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    def get_activation_fn(self) -> nn.Module:
        return FastBatchTopK(self.cfg.k)


@dataclass
class Residuals:
    """The training residuals of a layer, without sinks and repeated prompts."""

    shards: list[Shard]
    layer: int
    tokenizer: PreTrainedTokenizerBase
    cut: float = math.inf

    @property
    def n_batches(self) -> int:
        """Batches of one pass: a little less than the mask says, since sinks are not known yet."""
        wanted = sum(int(self._mask(shard).sum()) for shard in self.shards)
        return int(wanted * 0.995) // BATCH

    def rows(self) -> Iterator[torch.Tensor]:
        """Residuals [n, d_model] of one shard after the other, bf16."""
        for shard in self.shards:
            acts = shard.read(self.layer)
            yield acts[measure.without_sinks(acts, self._mask(shard), self.cut)]

    def sample(self, n_shards: int = MIX_SHARDS) -> torch.Tensor:
        """The first shards, [n, d_model]."""
        return torch.cat(list(itertools.islice(self.rows(), n_shards)))

    def batches(self) -> Iterator[torch.Tensor]:
        """Float32 batches [BATCH, d_model] of one pass, shuffled over a few shards at a time."""
        generator = torch.Generator().manual_seed(SEED)
        rows = self.rows()
        rest = torch.empty(0)
        while group := list(itertools.islice(rows, MIX_SHARDS)):
            acts = torch.cat([rest.to(group[0]).reshape(-1, group[0].shape[1]), *group])
            acts = acts[torch.randperm(len(acts), generator=generator)]
            whole = len(acts) // BATCH * BATCH
            yield from (batch.float() for batch in acts[:whole].split(BATCH))
            rest = acts[whole:]

    def _mask(self, shard: Shard) -> torch.Tensor:
        return learnable(shard.tokens, self.tokenizer, keep_prefix=KEEP_PREFIX)


def training_shards(tokens: Path, acts: Path, layer: int) -> list[Shard]:
    """In order. The model's own chats come in the second half, nearer to the end of training: that
    text is most like the demo's."""
    documents, chats = (shards(tokens, acts, part, layer) for part in (DOCUMENTS, CHATS))
    half = len(documents) // 2
    tail = documents[half:] + chats
    random.Random(SEED).shuffle(tail)
    return documents[:half] + tail


def fit(data: Residuals, width: int, k: float, checkpoints: Path) -> BatchTopKTrainingSAE:
    """Train in one pass with SAELens's trainer; a run that was stopped goes on where it was."""
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
        n_checkpoints=CHECKPOINTS,
        save_final_checkpoint=True,  # unrounded, should the threshold be wanted elsewhere
        checkpoint_path=str(checkpoints),
    )
    batches = data.batches()
    trainer = SAETrainer(config, sae, batches)
    # Set here, not estimated by the trainer, so that the bias can start at the mean in its units.
    scale = math.sqrt(d_in) / float(sample.norm(dim=-1).mean())
    trainer.activation_scaler.scaling_factor = scale
    sae.b_dec.data = sample.mean(0) * scale
    # The scaler is a checkpoint's last file: one without it was cut off.
    whole = [path.parent for path in checkpoints.glob(f"[0-9]*/{ACTIVATION_SCALER_CFG_FILENAME}")]
    if whole:
        _go_on(trainer, max(whole, key=lambda path: int(path.name)))
        for _ in range(trainer.n_training_steps):
            next(batches)
    return trainer.fit()


def _go_on(trainer: SAETrainer, stopped: Path) -> None:
    """Where a checkpoint was made. Its step was not counted yet, but its samples were."""
    trainer.sae.load_weights_from_checkpoint(stopped)
    trainer.load_trainer_state(stopped)
    samples = trainer.n_training_samples
    trainer.n_training_steps = samples // BATCH
    trainer.checkpoint_thresholds = [at for at in trainer.checkpoint_thresholds if at >= samples]


@torch.no_grad()
def finish(
    trained: BatchTopKTrainingSAE, acts: torch.Tensor, k: float
) -> tuple[SAE, dict[str, float]]:
    """The SAE as it will be stored: JumpReLU on raw residuals, bf16 matrices, exact threshold. And
    what the rounding changes.

    The moving-average threshold of training lags, so it is replaced by one calibrated on
    training residuals with the rounded weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        sae = SAE.load_from_disk(folder)
    unrounded = copy.deepcopy(sae)
    for matrix in (sae.W_enc, sae.W_dec):
        matrix.data = matrix.bfloat16().float()
    for one in (unrounded, sae):
        # b_dec is no longer subtracted from the input; what is, is what the rounded matrix makes of
        # it, so that its rounding acts on the rest of the input alone.
        one.b_enc.data -= one.b_dec @ one.W_enc
        one.cfg.apply_b_dec_to_input = False
    sae.threshold.data.zero_()
    chosen = torch.randperm(len(acts), generator=torch.Generator().manual_seed(SEED))[:16384]
    threshold = measure.calibrate_threshold(sae, acts[chosen], k)
    unrounded.threshold.data.fill_(threshold)
    return sae, measure.rounding(unrounded, sae, acts[chosen[:4096]])


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--acts", "--tokens", "--model", "--out", "--checkpoints"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--layer", type=int, default=LAYER)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--k", type=float, default=72)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = training_shards(args.tokens, args.acts, args.layer)
    data = Residuals(found, args.layer, tokenizer)
    first = data.shards[0]
    median, data.cut = measure.sink_cut(first.read(args.layer), learnable(first.tokens, tokenizer))
    print(f"median norm {median:.1f}, sink cut {data.cut:.1f}", flush=True)

    start = time.monotonic()
    trained = fit(data, args.width, args.k, args.checkpoints)
    print(f"trained in {time.monotonic() - start:.0f} s", flush=True)
    spread = data.shards[:: max(1, len(data.shards) // SPREAD_SHARDS)]
    acts = replace(data, shards=spread).sample(SPREAD_SHARDS)
    sae, rounding = finish(trained, acts, args.k)
    metadata = {
        "model_name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hook_name": f"blocks.{args.layer}.hook_resid_post",
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
    (args.out / "rounding.json").write_text(json.dumps(rounding, indent=2) + "\n")


if __name__ == "__main__":
    main()
