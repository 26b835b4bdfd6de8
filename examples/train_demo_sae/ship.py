"""Put together what ships of an SAE, small: weights, calibration, labels, examples, card.

Usage: `python ship.py --sae FOLDER --out FOLDER`
"""

import argparse
import shutil
from pathlib import Path

import msgspec
import pyarrow as pa

from neuroscope_vllm.core.artefacts import find_calibration
from neuroscope_vllm.core.examples import ExampleStore, find_examples, write_examples
from neuroscope_vllm.core.examples.records import SAMPLE, TOP
from neuroscope_vllm.core.examples.store import SCHEMAS
from neuroscope_vllm.core.labels import stored_labels

FILES = ("cfg.json", "sae_weights.safetensors", "MODEL_CARD.md")
KEPT = {TOP: 3, SAMPLE: 3}
"""Examples of a feature."""
BEFORE, AFTER = 14, 5
"""Tokens around an example's own."""


def small_examples(folder: Path, out: Path) -> None:
    """The first of each kind, with less around them, and no contexts: those are for scoring."""
    store = ExampleStore(folder)
    rows = store.table("examples").to_pylist()
    taken: dict[tuple[int, str], int] = {}
    kept = []
    for row in rows:
        key = row["feature"], row["kind"]
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= KEPT[row["kind"]]:
            kept.append(_shorter(row))
    collection = {"before": BEFORE, "after": AFTER, "top": KEPT[TOP], "sample": KEPT[SAMPLE]}
    tables = {
        "examples": pa.Table.from_pylist(kept, SCHEMAS["examples"]).to_batches(),
        "features": store.table("features").to_batches(),
        "contexts": [],
    }
    write_examples(out, msgspec.structs.replace(store.collection, **collection), tables)


def _shorter(row: dict) -> dict:
    first = max(0, row["at"] - BEFORE)
    inside = slice(first, row["at"] + AFTER + 1)
    return row | {
        "tokens": row["tokens"][inside],
        "activations": [round(value, 2) for value in row["activations"][inside]],
        "at": row["at"] - first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = str(args.sae)
    (args.out / "labels").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(args.sae / name, args.out)
    calibration, examples = find_calibration(source), find_examples(source)
    assert calibration is not None
    assert examples is not None
    shutil.copy(calibration, args.out)
    for path, labels in stored_labels(source).items():
        labels.save(args.out / "labels" / path.name)  # one line each, where a score added another
    small_examples(examples, args.out / "examples")


if __name__ == "__main__":
    main()
