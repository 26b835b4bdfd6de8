"""What features mean, in words: one JSONL file for each labeller. Torch-free.

    {"index": 4521, "text": "geography or place names", "labeller": "deepseek-v3.2", "score": 0.83}

Labels come from models and from web services and are shown in terminals and pages, so they are
cleaned on the way in: one line, no control characters, at most MAX_LABEL_CHARS.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from neuroscope_vllm.core.errors import ConfigError

MAX_LABEL_CHARS = 200


class Label(msgspec.Struct, frozen=True, omit_defaults=True):
    """One feature's label.

    Attributes:
        index: The feature.
        text: At most MAX_LABEL_CHARS, one line.
        labeller: Namespace: who wrote it.
        score: How well it predicts the feature, 0 to 1, if it was scored.
        method: How it was made and scored.
        model: Model that wrote it.
        created: ISO date.
    """

    index: int
    text: str
    labeller: str
    score: float | None = None
    method: str | None = None
    model: str | None = None
    created: str | None = None


class LabelSet:
    """The labels of one labeller, by feature."""

    def __init__(self, labeller: str, labels: Iterable[Label] = ()) -> None:
        """
        Raises:
            ConfigError: A label is of another labeller.
        """
        self.labeller = labeller
        self._labels: dict[int, Label] = {}
        for label in labels:
            self.add(label)

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[Label]:
        """Labels by ascending index."""
        return (self._labels[index] for index in sorted(self._labels))

    def add(self, label: Label) -> None:
        """Add a label, cleaned, in place of any earlier one of the same feature."""
        if label.labeller != self.labeller:
            raise ConfigError(
                f"a label of {label.labeller!r} was given to the labels of {self.labeller!r}; "
                f"keep one file for each labeller."
            )
        self._labels[label.index] = msgspec.structs.replace(label, text=clean_label(label.text))

    def get(self, index: int) -> Label | None:
        return self._labels.get(index)

    def search(self, query: str, limit: int = 20) -> list[Label]:
        """Labels that hold every word of the query, in any case, best first.

        Whole words come before beginnings of words, those before parts, then shorter
        labels before longer ones, then by index.
        """
        wanted = query.casefold().split()
        if not wanted:
            return []
        found = []
        for label in self:
            text = label.text.casefold()
            ranks = [_match_rank(word, text) for word in wanted]
            if all(rank is not None for rank in ranks):
                found.append((sum(rank or 0 for rank in ranks), len(text), label.index, label))
        return [entry[-1] for entry in sorted(found, key=lambda entry: entry[:3])[:limit]]

    def save(self, path: str | Path) -> None:
        """Write JSONL by ascending index; the file is replaced whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        encode = msgspec.json.Encoder().encode
        partial.write_bytes(b"".join(encode(label) + b"\n" for label in self))
        partial.replace(path)


def load_labels(path: str | Path) -> LabelSet:
    """Read one labeller's file. The labeller is the one its lines name.

    Raises:
        ConfigError: No such file, it is empty, or a line (which is named) is not a label, is out of
            range, or is of another labeller than the first.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(
            f"labels {path} cannot be read ({error.strerror}); give a JSONL file."
        ) from error
    labels: LabelSet | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        label = _parse_line(path, number, line)
        labels = labels or LabelSet(label.labeller)
        if label.labeller != labels.labeller:
            raise ConfigError(
                f"line {number} of {path} is a label of {label.labeller!r} but the file is of "
                f"{labels.labeller!r}; keep one file for each labeller."
            )
        labels.add(label)
    if labels is None:
        raise ConfigError(
            f"labels {path} holds no labels; make them with `examples/train_demo_sae/describe.py`."
        )
    return labels


def clean_label(text: str) -> str:
    """One line, without control, format or surrogate characters, at most MAX_LABEL_CHARS."""
    spaced = " ".join(text.split())
    kept = "".join(
        char for char in spaced if char in _JOINERS or unicodedata.category(char)[0] != "C"
    )
    if len(kept) <= MAX_LABEL_CHARS:
        return kept
    return kept[: MAX_LABEL_CHARS - 1].rstrip() + "…"


# Format characters that scripts and emoji need: zero-width non-joiner and joiner.
_JOINERS = "\u200c\u200d"

_decode = msgspec.json.Decoder(Label).decode


def _parse_line(path: str | Path, number: int, line: bytes) -> Label:
    try:
        label = _decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"line {number} of {path} is not a label ({error}); each line is JSON with index, text "
            f"and labeller."
        ) from error
    if label.index < 0:
        raise ConfigError(f"line {number} of {path} has index {label.index}; indices start at 0.")
    if not clean_label(label.text):
        raise ConfigError(f"line {number} of {path} has an empty text; leave the line out.")
    if not label.labeller:
        raise ConfigError(f"line {number} of {path} names no labeller; fill in labeller.")
    return label


def _match_rank(word: str, text: str) -> int | None:
    """0 for a whole word of text, 1 for the beginning of one, 2 for a part, None for none."""
    if word not in text:
        return None
    pattern = re.escape(word)
    if re.search(rf"(?<!\w){pattern}(?!\w)", text):
        return 0
    return 1 if re.search(rf"(?<!\w){pattern}", text) else 2
