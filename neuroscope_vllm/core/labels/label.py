"""What features mean, in words: one JSONL file for each labeller. Torch-free.

    {"index": 4521, "text": "geography or place names", "labeller": "deepseek-v3.2", "score": 0.83}

A later line of the same index replaces an earlier one, so a run can append as labels arrive.
Labels come from models and from web services and are shown in terminals and pages, so they are
cleaned on the way in: one line, no control characters, at most MAX_LABEL_CHARS.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels.search import TextIndex

logger = logging.getLogger(__name__)

MAX_LABEL_CHARS = 200
RELIABLE_SCORE = 0.6
"""A label that scored below predicts its feature little better than chance."""


class Label(msgspec.Struct, frozen=True, omit_defaults=True):
    """One feature's label.

    Attributes:
        index: The feature.
        text: At most MAX_LABEL_CHARS, one line.
        labeller: Namespace: who wrote it.
        score: How well it predicts the feature, 0 to 1; None: unscored.
        method: How it was made.
        model: Model that wrote it.
        created: ISO date.
        examples: How many examples of the feature its writer saw.
        author: Who published it, where that is not the labeller.
        detection, fuzzing: Class-balanced accuracies by which `neuroscope score` found the score.
        scorer: Model that judged.
        scored_on: ISO date.
        scoring: How it was scored: `detection@` and `fuzzing@`, each with a digest of the prompt,
            the examples and their number.
        positives, negatives: How many texts were judged, of those where it fires and of others.
    """

    index: int
    text: str
    labeller: str
    score: float | None = None
    method: str | None = None
    model: str | None = None
    created: str | None = None
    examples: int | None = None
    author: str | None = None
    detection: float | None = None
    fuzzing: float | None = None
    scorer: str | None = None
    scored_on: str | None = None
    scoring: str | None = None
    positives: int | None = None
    negatives: int | None = None

    @property
    def unreliable(self) -> bool:
        return self.score is not None and self.score < RELIABLE_SCORE

    def to_dict(self) -> dict[str, Any]:
        """Every field, those that are not known as None, and `unreliable`: how labels are sent to
        readers."""
        return {**msgspec.structs.asdict(self), "unreliable": self.unreliable}


class Summary(msgspec.Struct, frozen=True):
    """What a labeller's labels are, taken together.

    Attributes:
        labels: How many features have one.
        scored: How many were scored.
        unreliable: How many scored below RELIABLE_SCORE.
        mean_score: Of those that were scored.
        methods, models: All, by name.
        newest: The latest date.
    """

    labeller: str
    labels: int
    scored: int
    unreliable: int
    mean_score: float | None
    methods: list[str]
    models: list[str]
    newest: str | None


class LabelSet:
    """The labels of one labeller, by feature."""

    def __init__(self, labeller: str, labels: Iterable[Label] = ()) -> None:
        """
        Raises:
            ConfigError: A label is of another labeller.
        """
        self.labeller = labeller
        self._labels: dict[int, Label] = {}
        self._text_index: TextIndex | None = None
        self._building = threading.Lock()
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
        self._labels[label.index] = _cleaned(label)
        self._text_index = None

    def get(self, index: int) -> Label | None:
        return self._labels.get(index)

    def search(self, query: str, limit: int = 20) -> list[Label]:
        """Labels that hold every word of the query, best first: see `TextIndex.find`.

        The index is built by the first search. Any thread may search.

        Raises:
            ConfigError: This Python's SQLite has no full-text search.
        """
        with self._building:
            if self._text_index is None:
                self._text_index = TextIndex((label.index, label.text) for label in self)
            index = self._text_index
        return [self._labels[number] for number in index.find(query, limit)]

    def summary(self) -> Summary:
        labels = self._labels.values()
        scores = [label.score for label in labels if label.score is not None]
        return Summary(
            labeller=self.labeller,
            labels=len(labels),
            scored=len(scores),
            unreliable=sum(label.unreliable for label in labels),
            mean_score=sum(scores) / len(scores) if scores else None,
            methods=sorted({label.method for label in labels if label.method}),
            models=sorted({label.model for label in labels if label.model}),
            newest=max((label.created for label in labels if label.created), default=None),
        )

    def save(self, path: str | Path) -> None:
        """Write JSONL by ascending index; the file is replaced whole or not at all."""
        artefacts.write_whole(Path(path), self.to_jsonl())

    def to_jsonl(self) -> bytes:
        encode = msgspec.json.Encoder().encode
        return b"".join(encode(label) + b"\n" for label in self)


class NoLabels(ConfigError):
    """A label file without a label, such as one whose run has just begun."""


def load_labels(path: str | Path, labeller: str | None = None) -> LabelSet:
    """Read one labeller's file.

    A last line without an end, which a crash leaves, is left out with a warning.

    Args:
        labeller: Whose labels they are to be, whatever the lines say; by default the lines say.

    Raises:
        ConfigError: No such file, it is empty (NoLabels), or a line (which is named) is not a
            label, is out of range, or is of another labeller than the first.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"labels {path} cannot be read ({error.strerror}); give a JSONL file."
        ) from error
    lines = content.splitlines()
    if lines and not content.endswith(b"\n") and _is_cut_off(lines[-1]):
        logger.warning(
            "line %d of %s is cut off and left out; its writer may still run, or was stopped.",
            len(lines),
            path,
        )
        lines.pop()
    numbered = ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
    found = one_labeller(path, ((n, _parse_line(path, n, line, labeller)) for n, line in numbered))
    if found is None:
        raise NoLabels(
            f"labels {path} holds no labels; `neuroscope labels import` takes some over."
        )
    return found


def one_labeller(path: str | Path, labels: Iterable[tuple[int, Label]]) -> LabelSet | None:
    """Checked labels, with their line numbers, as a set; None if there are none.

    Raises:
        ConfigError: A label is out of range, or of another labeller than the first.
    """
    found: LabelSet | None = None
    for number, label in labels:
        _check(path, number, label)
        found = found or LabelSet(label.labeller)
        if label.labeller != found.labeller:
            raise ConfigError(
                f"line {number} of {path} is a label of {label.labeller!r} but the file is of "
                f"{found.labeller!r}; keep one file for each labeller."
            )
        found.add(label)
    return found


def stored_labels(source: str) -> dict[Path, LabelSet]:
    """All labels of the SAE at `source` by file, those that are shown first first.

    A file that cannot be read, or holds no label yet, is left out with a warning.
    """
    found = {}
    for path in artefacts.find_labels(source):
        try:
            found[path] = load_labels(path)
        except NoLabels as error:
            logger.warning("%s", error)
        except ConfigError as error:
            logger.warning("%s The labels of this file are left out.", error)
    return dict(sorted(found.items(), key=lambda item: preference(item[1])))


def labels_of(source: str, labeller: str) -> tuple[Path, LabelSet]:
    """The labels of one labeller of the SAE at `source`, and their file.

    Raises:
        ConfigError: There are none, or the file that bears the labeller's name cannot be read.
    """
    for path in artefacts.find_labels(source):
        if path.stem == labeller and (labels := load_labels(path)).labeller == labeller:
            return path, labels
    stored = stored_labels(source)
    for path, labels in stored.items():
        if labels.labeller == labeller:
            return path, labels
    known = ", ".join(labels.labeller for labels in stored.values()) or "none"
    raise ConfigError(f"there are no labels of {labeller!r} for {source}; its labellers: {known}.")


def preference(label_set: LabelSet) -> tuple[Any, ...]:
    """Sort key: of several labellers that know a feature, the first is shown in events.

    Reliable ones first, by mean score; then the unscored by name, then `tokens`, whose labels are
    lists of tokens, and last those that are unreliable on average. Label files that the user gives
    are in the order given instead.
    """
    mean, labeller = label_set.summary().mean_score, label_set.labeller
    if mean is None:
        return (2 if labeller == "tokens" else 1, 0.0, labeller)
    return (3 if mean < RELIABLE_SCORE else 0, -mean, labeller)


def clean_label(text: str, limit: int = MAX_LABEL_CHARS) -> str:
    """One line, without control, format or surrogate characters, at most `limit` characters."""
    if len(text) <= limit and text.isprintable() and "  " not in text and text == text.strip():
        return text
    spaced = _TERMINAL_COLOURS.sub("", " ".join(text.split())[: 20 * limit])
    kept = "".join(
        char for char in spaced if char in _JOINERS or unicodedata.category(char)[0] != "C"
    )
    kept = " ".join(kept.split()).strip(_EDGES)
    if len(kept) <= limit:
        return kept
    return kept[: limit - 1].rstrip(_EDGES) + "…"


# Format characters that scripts and emoji need: zero-width non-joiner and joiner.
_JOINERS = "\u200c\u200d"
_EDGES = _JOINERS + " "
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_PROVENANCE = ("method", "model", "created", "author", "scorer", "scored_on", "scoring")

_decode = msgspec.json.Decoder(Label).decode


def _cleaned(label: Label) -> Label:
    """Provenance is the same for thousands of labels: one string serves them all."""
    provenance = {
        name: sys.intern(clean_label(value))
        for name in _PROVENANCE
        if (value := getattr(label, name)) is not None
    }
    return msgspec.structs.replace(
        label, text=clean_label(label.text), labeller=sys.intern(label.labeller), **provenance
    )


def _is_cut_off(line: bytes) -> bool:
    """Whether a line is no JSON; one that is, but is no label, was written so."""
    try:
        msgspec.json.decode(line)
    except msgspec.DecodeError:
        return bool(line.strip())
    return False


def _parse_line(path: str | Path, number: int, line: bytes, labeller: str | None) -> Label:
    try:
        if labeller is None:
            return _decode(line)
        given = msgspec.json.decode(line, type=dict[str, Any])
        return msgspec.convert({**given, "labeller": labeller}, Label)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"line {number} of {path} is not a label ({error}); each line is JSON with index, text "
            f"and labeller."
        ) from error


def _check(path: str | Path, number: int, label: Label) -> None:
    where = f"line {number} of {path}"
    if label.index < 0:
        raise ConfigError(f"{where} has index {label.index}; indices start at 0.")
    if not clean_label(label.text):
        raise ConfigError(f"{where} has an empty text; leave the line out.")
    if not label.labeller:
        raise ConfigError(f"{where} names no labeller; fill in labeller.")
    if label.labeller != clean_label(label.labeller):
        raise ConfigError(f"{where} names a labeller with unprintable characters; rename it.")
    for name in ("score", "detection", "fuzzing"):
        if (value := getattr(label, name)) is not None and not 0 <= value <= 1:
            raise ConfigError(f"{where} has {name} {value}; scores lie between 0 and 1.")
    for name in ("examples", "positives", "negatives"):
        if (count := getattr(label, name)) is not None and count < 0:
            raise ConfigError(f"{where} has {count} {name}; leave {name} out.")
