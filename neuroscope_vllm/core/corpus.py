"""Samples of text for a corpus pass: token sequences cut from a dataset, in its own order.

Read through `datasets`, streaming: any dataset of the hub, or local .txt, .jsonl and .parquet
files. A row has a column `text`, `messages` (chats, put through the model's chat template) or
`token_ids` (what a server recorded). Long rows give several samples, very short ones none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec

from neuroscope_vllm.core.errors import ConfigError

WIKITEXT = "Salesforce/wikitext"
WIKITEXT_SUBSET = "wikitext-103-raw-v1"
COLUMNS = ("token_ids", "messages", "text")
"""Of a row that has several, the first is read."""

_BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}


class Corpus(msgspec.Struct, frozen=True, kw_only=True):
    """Which text, and how it is cut.

    Attributes:
        source: A file, a folder of files of one kind, or a dataset of the hub.
        subset: The dataset's configuration, if it has several.
        split: The dataset's split.
        column: Column to read; None: the first of COLUMNS that there is.
        revision: The dataset's commit, tag or branch.
        samples: At most so many sequences.
        max_tokens: Longest sequence, special tokens included.
        min_tokens: Shortest; headings and blank lines are shorter.
    """

    source: str = WIKITEXT
    subset: str | None = None
    split: str = "train"
    column: str | None = None
    revision: str | None = None
    samples: int = 1000
    max_tokens: int = 256
    min_tokens: int = 16

    def describe(self) -> str:
        """In one line, for provenance."""
        parts = [self.source, self.subset, self.split if is_hub(self.source) else None]
        shown = " ".join(part for part in parts if part)
        return f"{shown}, {self.samples} samples of {self.max_tokens} tokens at most"


def is_hub(source: str) -> bool:
    return not Path(source).expanduser().exists()


def check(corpus: Corpus) -> None:
    """What can be said of a corpus before it is read. Raises ConfigError."""
    path = Path(corpus.source).expanduser()
    if path.exists():
        _local(path)
    elif path.suffix.lower() in _BUILDERS or corpus.source.startswith(("/", ".", "~")):
        raise ConfigError(f"corpus {corpus.source} does not exist; check the path.")


def samples(corpus: Corpus, tokenizer: Any) -> Iterator[list[int]]:
    """Token sequences of `corpus`, each with the special tokens that the model's inputs have.

    Args:
        tokenizer: The model's, with transformers' interface.

    Raises:
        ConfigError: The corpus can not be read or has no such column; `datasets` is not installed.
    """
    return islice(_cut(corpus, tokenizer), corpus.samples)


def digest(sequences: Sequence[Sequence[int]], before: str = "") -> str:
    """Identifies sequences and all that came before them."""
    text = msgspec.json.encode([before, sequences])
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _cut(corpus: Corpus, tokenizer: Any) -> Iterator[list[int]]:
    rows = _rows(corpus)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"corpus {corpus.source} has no rows; give one with text in it.")
    column = _column(corpus, first)
    start = tokenizer.encode("")  # what every input begins with, if anything
    room = corpus.max_tokens - len(start)
    for number, row in enumerate(chain([first], rows), start=1):
        try:
            tokens = _tokens(row.get(column), column, tokenizer)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"row {number} of corpus {corpus.source} has no {column} that can be read"
                f" ({error}); mend it or name another column."
            ) from error
        if tokens[: len(start)] == start:  # a chat template brings its own
            tokens = tokens[len(start) :]
        for at in range(0, len(tokens), room):
            part = tokens[at : at + room]
            if len(part) >= corpus.min_tokens:
                yield [*start, *part]


def _tokens(value: Any, column: str, tokenizer: Any) -> list[int]:
    """Of one row, without what `encode` puts in front."""
    if value is None:
        return []
    if isinstance(value, str):
        return tokenizer.encode(value, add_special_tokens=False)
    if not isinstance(value, list):
        raise TypeError(f"it is a {type(value).__name__}")
    if value and isinstance(value[0], dict):
        text = tokenizer.apply_chat_template([_message(one) for one in value], tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False)
    size = len(tokenizer)
    wrong = next((i for i in value if not isinstance(i, int) or not 0 <= i < size), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is none of the model's {size} token ids")
    return value


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """With the text of OpenAI's content parts in place of the parts."""
    content = message.get("content")
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise TypeError(f"a message of {message.get('role')!r} has no text")
    kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
    if kinds - {"text"}:
        raise TypeError(f"a message of {message.get('role')!r} has parts that are no text")
    return {**message, "content": "".join(part["text"] for part in content)}


def _rows(corpus: Corpus) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "reading a corpus needs datasets, which is not installed;"
            " pip install 'neuroscope-vllm[corpus]'."
        ) from None
    datasets.disable_progress_bars()
    try:
        if is_hub(corpus.source):
            subset = corpus.subset or (WIKITEXT_SUBSET if corpus.source == WIKITEXT else None)
            dataset = datasets.load_dataset(
                corpus.source, subset, split=corpus.split, revision=corpus.revision, streaming=True
            )
        else:
            builder, files = _local(Path(corpus.source).expanduser())
            options: dict[str, Any] = {"sample_by": "paragraph"} if builder == "text" else {}
            dataset = datasets.load_dataset(
                builder, data_files=files, split="train", streaming=True, **options
            )
        yield from dataset
    except ConfigError:
        raise
    # Readers of many formats and a network client: what they raise has no base of its own.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"corpus {corpus.source} can not be read ({reason}); give a .txt, .jsonl or .parquet"
            " file, or a dataset of the hub that you can reach."
        ) from error


def _local(path: Path) -> tuple[str, list[str]]:
    """The reader of local files, and the files, by name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    kinds = {_BUILDERS.get(file.suffix.lower()) for file in files}
    builder = kinds.pop() if len(kinds) == 1 else None
    if builder is None:
        found = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
        raise ConfigError(
            f"corpus {path} holds {found}; give files of one kind, .txt, .jsonl or .parquet."
        )
    return builder, [str(file) for file in files]


def _column(corpus: Corpus, row: dict[str, Any]) -> str:
    wanted = COLUMNS if corpus.column is None else (corpus.column,)
    column = next((name for name in wanted if name in row), None)
    if column is None:
        raise ConfigError(
            f"corpus {corpus.source} has the columns {', '.join(row)}, but no"
            f" {' or '.join(wanted)}; name one with --column."
        )
    return column
