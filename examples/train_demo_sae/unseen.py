"""The text that training never saw, as JSONL for `neuroscope bench ranking`.

Usage: `python unseen.py --tokens FOLDER --out unseen.jsonl`
"""

import argparse
import json
from pathlib import Path

from corpus import HELD_OUT_PART, NAMES, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    held_out = load(args.tokens, HELD_OUT_PART)
    rows = zip(held_out["tokens"].tolist(), held_out["source"].tolist(), strict=True)
    with args.out.open("w", encoding="utf-8") as out:
        for ids, source in rows:
            out.write(json.dumps({"token_ids": ids, "source": NAMES[source]}) + "\n")


if __name__ == "__main__":
    main()
