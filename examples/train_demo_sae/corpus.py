"""The demo's corpus: rows of token ids, half plain text, half in the model's chat form.

Usage: `python corpus.py --model FOLDER --out tokens.safetensors --cache FOLDER`
"""

import argparse
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sources import SOURCES, Document, fetch

SEQ_LEN = 256
SEED = 0
HELD_OUT = 0.08  # of the documents of each source
SAMPLED = "sampled"  # the model's own chats: no package
SAMPLED_SHARE = 0.08

ASK_ABOUT = ("Tell me about {}.", "What is {}?", "Explain {}.", "What do you know about {}?")
ASK_CONTINUE = ("Continue this text: {}", "Please go on: {}", "What comes next? {}")
ASK_REWRITE = (
    "Summarise this text:\n\n{}",
    "Rewrite this:\n\n{}",
    "What is the main point here?\n\n{}",
)


def build(tokenizer, n_tokens: int, held_out: bool = False, **kwargs) -> torch.Tensor:
    """Token ids [n_seq, SEQ_LEN] int64, shuffled; chat rows begin with the BOS (`<|im_start|>`)."""
    return mix(tokenizer, n_tokens, held_out, **kwargs)[0]


def mix(
    tokenizer, n_tokens: int, held_out: bool = False, *, cache: Path, chats: Path | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `build`, with the source of each row: an index into `[*SOURCES, SAMPLED]`.

    A source too small for its share gives all it has. `chats` is a file of `sample.py`'s; its rows
    come in the second half, nearer to the end of training, where the text is most like the demo's.
    """
    wanted = n_tokens // SEQ_LEN
    rows: list[tuple[list[int], int]] = []
    total = sum(source.share for source in SOURCES.values()) + SAMPLED_SHARE
    for index, (name, source) in enumerate(SOURCES.items()):
        rng = random.Random(f"{SEED} {name}")
        made = list(_source_rows(tokenizer, name, cache, held_out, rng))
        rng.shuffle(made)
        rows += [(row, index) for row in made[: round(wanted * source.share / total)]]
    rng = random.Random(SEED)
    rng.shuffle(rows)
    if chats:
        sampled = _sampled_rows(chats, held_out)[: round(wanted * SAMPLED_SHARE / total)]
        tail = rows[len(rows) // 2 :] + [(row, len(SOURCES)) for row in sampled]
        rng.shuffle(tail)
        rows[len(rows) // 2 :] = tail
    return torch.tensor([r for r, _ in rows]), torch.tensor([i for _, i in rows])


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


def _source_rows(
    tokenizer, name: str, cache: Path, held_out: bool, rng: random.Random
) -> Iterator[list[int]]:
    """Rows of one package; whole documents are held out, and each is either plain or chat.

    Not quite held out: chats draw from `rng` too, so the two parts split the documents differently,
    and some are in both. Kept, because it is how the SAE that ships was trained; give the split
    random numbers of its own before training another. `unseen.py` finds text that is in neither.
    """
    source = SOURCES[name]
    for document in source.read(fetch(source, cache)):
        kept_back, as_chat = rng.random() < HELD_OUT, rng.random() < 0.5
        if not document or kept_back != held_out:
            continue
        make = _chat_rows if as_chat else _plain_rows
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


def _sampled_rows(chats: Path, held_out: bool) -> list[list[int]]:
    """The model's own chats, one a row, filled up with the next one; the last are held out."""
    data = load_file(chats)
    whole = [ids.tolist() for ids in data["ids"].split(data["lengths"].tolist())]
    cut = round(len(whole) * (1 - HELD_OUT))
    part = whole[cut:] if held_out else whole[:cut]
    rows = [(chat + following)[:SEQ_LEN] for chat, following in itertools.pairwise(part)]
    return [row for row in rows if len(row) == SEQ_LEN]


def _ids(tokenizer, turns: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(turns, return_dict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_200_000)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    out = {}
    for part, n in (("train", args.tokens), ("held_out", 100_000)):
        tokens, source = mix(tokenizer, n, part == "held_out", cache=args.cache, chats=args.chats)
        out |= {part: tokens.int(), f"{part}_source": source.int()}
        chat = (tokens[:, 0] == tokenizer.bos_token_id).float().mean()
        print(f"{part}: {tokens.numel():,} tokens, {chat:.0%} of the rows in chat form")
        for index, name in enumerate([*SOURCES, SAMPLED]):
            print(f"  {name}: {SEQ_LEN * int((source == index).sum()):,}")
    save_file(out, args.out)


if __name__ == "__main__":
    main()
