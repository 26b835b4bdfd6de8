"""Residuals of one layer for every token of a corpus, row by row, in bf16.

Usage: `python collect.py --model FOLDER --tokens tokens.safetensors --out FOLDER`

With `--worker 0 --workers 2` and so on, several processes share the shards.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYER = 20
ROWS_PER_SHARD = 128


def load_cut(model: Path, layer: int = LAYER) -> torch.nn.Module:
    """The decoder stack up to and with `layer`, whose output is then that layer's `resid_post`."""
    from transformers import AutoModel

    stack = AutoModel.from_pretrained(model, dtype=torch.bfloat16).eval()
    stack.layers = stack.layers[: layer + 1]
    stack.norm = torch.nn.Identity()
    return stack


@torch.inference_mode()
def residuals(stack: torch.nn.Module, tokens: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """Tokens [n_seq, seq_len] to resid_post [n_seq, seq_len, d_model], bf16, nothing masked."""
    parts = [stack(rows, use_cache=False).last_hidden_state for rows in tokens.long().split(batch)]
    return torch.cat(parts)


def collect(
    stack: torch.nn.Module,
    tokens: torch.Tensor,
    folder: Path,
    part: str,
    worker: int = 0,
    workers: int = 1,
) -> None:
    """Write this worker's `part-00000.safetensors` and so on; shards already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, rows in enumerate(tokens.split(ROWS_PER_SHARD)):
        path = folder / f"{part}-{i:05}.safetensors"
        if i % workers != worker or path.exists():
            continue
        start = time.monotonic()
        shard = residuals(stack, rows)
        save_file({"resid_post": shard}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        print(f"{path.name}: {rows.numel() / (time.monotonic() - start):,.0f} tokens/s", flush=True)


def stream(folder: Path, part: str, n_rows: int) -> Iterator[torch.Tensor]:
    """Shards [ROWS_PER_SHARD, seq_len, d_model] in order; waits for those not yet collected."""
    for i in range(math.ceil(n_rows / ROWS_PER_SHARD)):
        path = folder / f"{part}-{i:05}.safetensors"
        while not path.exists():
            time.sleep(1)
        yield load_file(path)["resid_post"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    stack, data = load_cut(args.model), load_file(args.tokens)
    for part in ("held_out", "train"):
        collect(stack, data[part], args.out, part, args.worker, args.workers)


if __name__ == "__main__":
    main()
