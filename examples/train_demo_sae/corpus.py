"""The demo's corpus: rows of token ids, half plain text, half in the model's chat form.

Usage: `python corpus.py --model FOLDER --cache FOLDER --chats FOLDER --out FOLDER`

Writes `documents`, `chats` (of the model itself) and `held_out`, each a .safetensors of `tokens`
[n_seq, SEQ_LEN] and the `source` of each row; and `shippable.parquet`, of `token_ids`, half chats
and half documents of which pieces may ship, as `neuroscope calibrate` and `collect` read it.
"""

import argparse
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from sample import PROMPTS, questions, read
from sources import HELD_OUT, SHIPPABLE, SOURCES, Document, Source, fetch

SEQ_LEN = 256
SEED = 0
SAMPLED = "sampled"  # the model's own chats: no package
NAMES = [*SOURCES, *HELD_OUT, SAMPLED]
"""What the numbers in `source` mean."""
DOCUMENTS, CHATS, HELD_OUT_PART = "documents", "chats", "held_out"
HELD_OUT_TOPICS = 20  # of the topics of the model's chats, one in so many
HELD_OUT_CHATS = 150  # rows
SHIPPABLE_ROWS = 4_608

ASK_ABOUT = ("Tell me about {}.", "What is {}?", "Explain {}.", "What do you know about {}?")
ASK_CONTINUE = ("Continue this text: {}", "Please go on: {}", "What comes next? {}")
ASK_REWRITE = (
    "Summarise this text:\n\n{}",
    "Rewrite this:\n\n{}",
    "What is the main point here?\n\n{}",
)

Rows = list[tuple[list[int], int]]
"""Token ids, and an index into NAMES."""


def documents(tokenizer, sources: dict[str, Source], cache: Path) -> Rows:
    """Rows of packages, shuffled; chat rows begin with the BOS (`<|im_start|>`)."""
    rows: Rows = []
    for name, source in sources.items():
        rng = random.Random(f"{SEED} {name}")
        made = list(_source_rows(tokenizer, source, cache, rng))
        rng.shuffle(made)
        rows += [(row, NAMES.index(name)) for row in made[: source.tokens // SEQ_LEN]]
    random.Random(SEED).shuffle(rows)
    return rows


def chats(folder: Path, held_out: bool) -> Rows:
    """Rows of the model's own chats, on topics that are held out, or on all others."""
    kept_back = {topic for _, topics in PROMPTS["asks"] for topic in topics[::HELD_OUT_TOPICS]}
    whole = [
        chat
        for chat, (_, topic) in zip(read(folder), questions(), strict=False)
        if (topic in kept_back) == held_out
    ]
    rows: Rows = []
    for chat, following in itertools.pairwise(whole):
        windows = [(chat + following)[:SEQ_LEN]]
        if len(chat) >= 1.5 * SEQ_LEN:
            windows.append(chat[-SEQ_LEN:])
        rows += [(row, NAMES.index(SAMPLED)) for row in windows if len(row) == SEQ_LEN]
    return rows


def learnable(tokens: torch.Tensor, tokenizer, keep_prefix: int = 0) -> torch.Tensor:
    """Mask [n_seq, SEQ_LEN] bool: False on special tokens and on the template's system prompt.

    The system prompt is the same in every chat, so its states would be learned by heart;
    `keep_prefix=n` keeps it in every n-th row.
    """
    special = torch.tensor(tokenizer.all_special_ids)
    mask = ~torch.isin(tokens, special)
    prefix = torch.tensor(_ids(tokenizer, [{"role": "user", "content": ""}]))
    first = int((prefix == tokenizer.bos_token_id).nonzero()[1])  # where the user's turn starts
    has = (tokens[:, :first] == prefix[:first]).all(1)
    if keep_prefix:
        has &= torch.arange(len(tokens)) % keep_prefix != 0
    mask[:, :first] &= ~has[:, None]
    return mask


def _source_rows(tokenizer, source: Source, cache: Path, rng: random.Random) -> Iterator[list[int]]:
    """Rows of one package; each document is either plain or chat."""
    for document in source.read(fetch(source, cache)):
        make = _chat_rows if rng.random() < 0.5 else _plain_rows
        if document:
            yield from make(tokenizer, document, rng)


def _plain_rows(tokenizer, document: Document, rng: random.Random) -> Iterator[list[int]]:
    """The document with its headings, cut into windows."""
    text = "\n\n".join(f"{title}\n\n{body}" if title else body for title, body in document)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    yield from (ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN))


def _chat_rows(tokenizer, document: Document, rng: random.Random) -> Iterator[list[int]]:
    """Conversations that answer with the document's own words, as many turns as fill a row."""
    turns: list[dict[str, str]] = []
    for title, body in document:
        for piece in _pieces(body, rng.randint(300, 900)):
            turns += _exchange(title, piece, rng)
            if len(ids := _ids(tokenizer, turns)) >= SEQ_LEN:
                yield ids[:SEQ_LEN]
                turns = []


def _exchange(title: str, piece: str, rng: random.Random) -> list[dict[str, str]]:
    """One question and its answer. A text to rewrite is its own answer: only its state counts."""
    style = rng.random()
    if title and style < 0.6:
        question, answer = rng.choice(ASK_ABOUT).format(title), piece
    elif style < 0.8:
        cut = piece.find(" ", rng.randint(40, len(piece) // 2 + 40))
        question, answer = rng.choice(ASK_CONTINUE).format(piece[:cut]), piece[cut + 1 :]
    else:
        question, answer = rng.choice(ASK_REWRITE).format(piece), piece
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _pieces(text: str, size: int) -> Iterator[str]:
    """Runs of whole sentences of about `size` characters."""
    piece = ""
    for sentence in re.split(r"(?<=[.!?]) |\n\n", text):
        piece = f"{piece} {sentence}".strip()
        if len(piece) >= size:
            yield piece
            piece = ""
    if len(piece) >= 80:
        yield piece


def _ids(tokenizer, turns: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(turns, return_dict=False)


def save(rows: Rows, path: Path, bos: int) -> None:
    tokens = torch.tensor([ids for ids, _ in rows], dtype=torch.int32)
    source = torch.tensor([index for _, index in rows], dtype=torch.int32)
    share = (tokens[:, 0] == bos).float().mean()
    print(f"{path.stem}: {tokens.numel():,} tokens, {share:.0%} of the rows in chat form")
    for index, name in enumerate(NAMES):
        if count := int((source == index).sum()):
            print(f"  {name}: {SEQ_LEN * count:,}")
    save_file({"tokens": tokens, "source": source}, path)


def save_shippable(folder: Path) -> None:
    """Of the parts that are there."""
    documents, own = load(folder, DOCUMENTS), load(folder, CHATS)["tokens"]
    wanted = torch.tensor([NAMES.index(name) for name in SHIPPABLE])
    texts = documents["tokens"][torch.isin(documents["source"], wanted)]
    rng = random.Random(SEED)
    rows = [row for part in (texts, own) for row in rng.sample(part.tolist(), SHIPPABLE_ROWS // 2)]
    rng.shuffle(rows)
    pq.write_table(pa.table({"token_ids": rows}), folder / "shippable.parquet")


def load(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{part}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = chats(args.chats, held_out=True)[:HELD_OUT_CHATS]
    parts = {
        DOCUMENTS: lambda: documents(tokenizer, SOURCES, args.cache),
        CHATS: lambda: chats(args.chats, held_out=False),
        HELD_OUT_PART: lambda: documents(tokenizer, HELD_OUT, args.cache) + held_out,
    }
    for part, make in parts.items():
        save(make(), args.out / f"{part}.safetensors", tokenizer.bos_token_id)
    save_shippable(args.out)


if __name__ == "__main__":
    main()
