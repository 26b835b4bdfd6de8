"""Residuals of every token of the corpus, row by row, in bf16, from our own engine.

Usage: `python collect.py --model FOLDER --tokens FOLDER --out FOLDER`

With `--worker 0 --workers 2` and so on, several processes share the shards. A run that was stopped
goes on where it was.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import CHATS, DOCUMENTS, HELD_OUT_PART, NAMES, SAMPLED, load
from safetensors import safe_open
from safetensors.torch import save_file

from neuroscope_vllm.engine.hf.patch_engine import HFPatchEngine

LAYER = 20
OTHER_LAYERS = {10: 3, 28: 3}
"""Collected of one shard in so many: their SAEs are smaller."""
ROWS_PER_SHARD = 128


def layers_of(part: str, shard: int) -> list[int]:
    everything = part == HELD_OUT_PART
    others = [layer for layer, every in OTHER_LAYERS.items() if everything or shard % every == 0]
    return sorted([LAYER, *others])


def residuals(
    engine: HFPatchEngine, rows: torch.Tensor, layers: list[int]
) -> dict[str, torch.Tensor]:
    """Tokens [n_seq, seq_len] to resid_post [n_seq, seq_len, d_model] by layer, nothing masked."""
    found = engine.residuals(rows.tolist(), layers)
    return {name(layer): torch.stack([one[layer].bfloat16() for one in found]) for layer in layers}


def name(layer: int) -> str:
    return f"layer_{layer}"


def shard_path(folder: Path, part: str, shard: int) -> Path:
    return folder / f"{part}-{shard:05}.safetensors"


def collect(
    engine: HFPatchEngine,
    tokens: torch.Tensor,
    folder: Path,
    part: str,
    worker: int = 0,
    workers: int = 1,
) -> None:
    """Write this worker's shards of a part; those already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, rows in enumerate(tokens.split(ROWS_PER_SHARD)):
        path = shard_path(folder, part, shard)
        if shard % workers != worker or path.exists():
            continue
        start = time.monotonic()
        found = residuals(engine, rows, layers_of(part, shard))
        save_file(found, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        print(f"{path.name}: {rows.numel() / (time.monotonic() - start):,.0f} tokens/s", flush=True)


@dataclass(frozen=True)
class Shard:
    """Rows of a part, and where their residuals are or will be."""

    path: Path
    tokens: torch.Tensor  # [n_seq, seq_len]
    sampled: torch.Tensor  # [n_seq] bool: the model's own chats

    def read(self, layer: int = LAYER) -> torch.Tensor:
        """Residuals [n_seq, seq_len, d_model]; waits for them."""
        while not self.path.exists():
            time.sleep(1)
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name(layer))


def shards(tokens: Path, acts: Path, part: str, layer: int = LAYER) -> list[Shard]:
    """Those of a part that have this layer."""
    data = load(tokens, part)
    rows = zip(*(data[key].split(ROWS_PER_SHARD) for key in ("tokens", "source")), strict=True)
    return [
        Shard(shard_path(acts, part, i), ids, source == NAMES.index(SAMPLED))
        for i, (ids, source) in enumerate(rows)
        if layer in layers_of(part, i)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    # Several processes of one thread share a machine better than one of many.
    torch.set_num_threads(1)
    engine = HFPatchEngine(str(args.model), "cpu", "bfloat16")
    for part in (HELD_OUT_PART, DOCUMENTS, CHATS):
        tokens = load(args.tokens, part)["tokens"]
        collect(engine, tokens, args.out, part, args.worker, args.workers)


if __name__ == "__main__":
    main()
