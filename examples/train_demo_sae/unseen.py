"""Text of the same packages that training never saw: the beginning of each document, as JSONL.

Usage: `python unseen.py --model FOLDER --cache FOLDER --out unseen.jsonl`

A document is taken if it shares no run of RUN tokens with any training row: `corpus.py`'s held-out
part is weaker, as a document may be held out of it and yet have been trained on. Every other one
is in the chat form.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from corpus import SEQ_LEN, _chat_rows, build
from sources import SOURCES, Document, fetch

RUN = 16
MIN_TOKENS = 128
PER_SOURCE = 40
TRAINING_TOKENS = 2_200_000


def beginnings(tokenizer, documents: list[Document], trained: set[int]) -> Iterator[list[int]]:
    """At most SEQ_LEN token ids of each document that was not trained on, in random order."""
    rng = random.Random(0)
    rng.shuffle(documents)
    as_chat = False
    for document in documents:
        parts = (f"{title}\n\n{body}" if title else body for title, body in document)
        ids = tokenizer.encode("\n\n".join(parts), add_special_tokens=False, verbose=False)
        if len(ids) < MIN_TOKENS or not trained.isdisjoint(runs(ids)):
            continue
        if as_chat:
            ids = next(_chat_rows(tokenizer, document, rng), None)
        if ids:
            as_chat = not as_chat
            yield ids[:SEQ_LEN]


def runs(ids: list[int]) -> Iterator[int]:
    """A hash of each run of RUN tokens."""
    return (hash(tuple(ids[i : i + RUN])) for i in range(len(ids) - RUN + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--cache", "--out"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = build(tokenizer, TRAINING_TOKENS, cache=args.cache).tolist()
    trained = {run for row in rows for run in runs(row)}
    with args.out.open("w", encoding="utf-8") as out:
        for name, source in SOURCES.items():
            documents = [d for d in source.read(fetch(source, args.cache)) if d]
            taken = 0
            for ids in beginnings(tokenizer, documents, trained):
                out.write(json.dumps({"token_ids": ids, "source": name}) + "\n")
                taken += 1
                if taken == PER_SOURCE:
                    break
            print(f"{name}: {taken} documents", flush=True)


if __name__ == "__main__":
    main()
