"""Labels from Neuronpedia's public exports: explanation rows become labels. Torch-free.

Neuronpedia states no licence for them, so we fetch them for a user and never ship any. Explanations
are texts of language models, some of them with the model's thoughts or prompt in them.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import Label, LabelSet, clean_label

LABELLER = "neuronpedia"
MAX_CHARS = 120
MAX_LINE = 64 * 2**20
"""Bytes of a row; real ones have 10 kB, most of it an embedding."""
MAX_READ = 4000
"""Characters of an explanation that are looked at for markup."""

_BETWEEN_MARKS = r"""[\s"'`“”]*(?:and|or|to|[,/&…]|\.\.\.)?[\s"'`“”]*"""
_OPENING = r"(?:okay|ok|alright|all right|hmm+|well|sure|so|right|first|now)\b[,.:!…]+"
_INTENT = (
    r"(?:let me|let['’]s|i need to|i have to|i['’]ll|i will|we need to|we have to)\s+"
    r"(?:first\s+)?(?:look|see|analy[sz]e|think|start|begin|examine|find|figure|check|consider|go)"
)
_TASK = r"(?:tokens?|activat\w+|neurons?|features?|explanations?|logits|texts?|examples|labels?)"
LEAKED = re.compile(
    "|".join(
        (
            r"MAX_ACTIVATING_TOKENS",  # names of the prompt's sections
            r"TOP_POSITIVE_LOGITS",
            r"The user wants",  # thoughts
            r"Method \d",  # the prompt's instructions
            # Thoughts between their marks, but not a label about the marks themselves.
            rf"(?is:<think(?:ing)?>(?!{_BETWEEN_MARKS}</think).*?</think(?:ing)?>)",
            rf"(?is:^\W*<think(?:ing)?>\s*(?:{_OPENING}|{_INTENT}))",
            # Thoughts aloud, where they are about the task.
            rf"(?is:^\W*(?:{_OPENING}\s*(?:so,?\s+)?)?{_INTENT}\b.{{0,80}}?\b{_TASK}\b)",
        )
    )
)
"""What no label holds: traces of the explainer's prompt and of its chain of thought."""

MARKUP = (
    (re.compile(r"^\[?(?:Explanation|EXPLANATION|Label|LABEL)\]?:\s*"), ""),
    (re.compile(r"^(?:#{1,6}|[-*•>])\s+"), ""),  # heading, list item, quotation
    (re.compile(r"\*\*([^\s*](?:[^*]*[^\s*])?)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^\s*](?:[^*]*[^\s*])?)\*(?![\w*])"), r"\1"),
    (re.compile(r"`([^`]+)`"), r"\1"),
    (re.compile(r'^"([^"]*)"$'), r"\1"),
    (re.compile(r"^'([^']*)'$"), r"\1"),
    (re.compile(r"^“([^“”]*)”$"), r"\1"),
    (re.compile(r"^‘([^‘’]*)’$"), r"\1"),
    (re.compile(r"^«([^«»]*)»$"), r"\1"),
)
"""The marker of an answer, Markdown, and quotes around the whole, with what replaces them."""

_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class _Score(msgspec.Struct):
    value: float | None = None


class _Row(msgspec.Struct):
    """One explanation, as exported. `layer` is the source's id; `scores` and `createdAt` are in
    the API's answers and not in every export."""

    index: str | int
    description: str | None
    modelId: str | None = None
    layer: str | None = None
    authorId: str | None = None
    typeName: str | None = None
    explanationModelName: str | None = None
    createdAt: str | None = None
    scores: list[_Score] | None = None


def is_neuronpedias(labels: LabelSet) -> bool:
    """Whether labels are Neuronpedia's: by the labeller's name, or by the method of one of them.

    The methods of its own explainers begin with `np_`; a user who renamed the labeller kept them.
    """
    return labels.labeller.casefold().startswith(LABELLER) or any(
        label.method is not None and label.method.startswith("np_") for label in labels
    )


class Explanations(NamedTuple):
    """What was read: labels, and how many rows gave none.

    Attributes:
        leaked: Rows with traces of a prompt or of thoughts.
        empty: Rows without a text.
        others: Further explanations of features that have a label.
    """

    labels: LabelSet
    leaked: int
    empty: int
    others: int


def check_identifier(identifier: str) -> str:
    """The same "model/source". Raises ConfigError if it is not one."""
    if not _IDENTIFIER.fullmatch(identifier):
        raise ConfigError(
            f"{identifier!r} is no source of Neuronpedia; write MODEL/SOURCE, such as "
            f"gemma-2-2b/20-gemmascope-res-16k."
        )
    return identifier


def local_files(paths: Iterable[Path]) -> list[Path]:
    """The explanation files among files and folders, by number.

    Of a folder, those in its `explanations` if there is one. Raises ConfigError if there are none.
    """
    found: list[Path] = []
    for path in paths:
        folder = path / "explanations" if (path / "explanations").is_dir() else path
        inside = folder.iterdir() if folder.is_dir() else [folder]
        files = [file for file in inside if file.name.endswith((".jsonl", ".jsonl.gz"))]
        if not files:
            raise ConfigError(
                f"{path} has no explanations; give .jsonl or .jsonl.gz files of an export, or a "
                f"folder of them."
            )
        found += sorted(files, key=by_number)
    return found


def by_number(path: Path) -> tuple[int, str]:
    """Sort key of files: batch-2 before batch-10."""
    digits = re.search(r"\d+", path.name)
    return (int(digits[0]) if digits else -1, path.name)


def read_explanations(files: Iterable[Path], identifier: str | None, width: int) -> Explanations:
    """Labels from exported rows.

    Of several explanations of a feature, the best scored is taken, else the newest, else the last.

    Args:
        files: JSONL, or JSONL.gz; rows in any order.
        identifier: "model/source" that all rows must be of, where they name theirs.
        width: Number of features of the SAE.

    Raises:
        ConfigError: A file is damaged, or a row (which is named) is no explanation, is of another
            source, or of a feature that the SAE does not have.
    """
    best: dict[int, Label] = {}
    leaked = empty = others = 0
    for where, row in _rows(files):
        index = _index(where, row, identifier, width)
        text = sanitise(row.description or "")
        if text is None:
            leaked += 1
            continue
        if not text:
            empty += 1
            continue
        label = _label(index, text, row)
        earlier = best.get(index)
        others += earlier is not None
        if earlier is None or _worth(label) >= _worth(earlier):
            best[index] = label
    return Explanations(LabelSet(LABELLER, best.values()), leaked, empty, others)


def sanitise(text: str) -> str | None:
    """An explanation as a label: one line without markup, at most MAX_CHARS; None: a leak."""
    if LEAKED.search(text):
        return None
    whole = _without_markup(text, MAX_READ)
    short = _without_markup(whole, MAX_CHARS)
    return None if LEAKED.search(whole) or LEAKED.search(short) else short


def _without_markup(text: str, limit: int) -> str:
    while True:
        plain = clean_label(text, limit)
        for pattern, replacement in MARKUP:
            plain = pattern.sub(replacement, plain)
        if plain == text:
            return text
        text = plain


def _rows(files: Iterable[Path]) -> Iterator[tuple[str, _Row]]:
    """Rows, each with the place where it stands."""
    decode = msgspec.json.Decoder(_Row).decode
    for path in files:
        for number, line in enumerate(_lines(path), start=1):
            where = f"line {number} of {path}"
            if len(line) > MAX_LINE:
                raise ConfigError(f"{where} is longer than {MAX_LINE >> 20} MiB; it is no export.")
            if not line.strip():
                continue
            try:
                yield where, decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{where} is no explanation ({error}); give files of an export's explanations."
                ) from error


def _lines(path: Path) -> Iterator[bytes]:
    """Lines, the longest cut after MAX_LINE + 1 bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{path} is cut off or damaged ({error}); delete it and fetch it again."
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path.") from error


def _index(where: str, row: _Row, identifier: str | None, width: int) -> int:
    written = str(row.index)
    if not re.fullmatch(r"[0-9]{1,9}", written):
        raise ConfigError(f"{where} has index {written[:40]!r}, which is no feature's number.")
    index = int(written)
    source = f"{row.modelId}/{row.layer}"
    if identifier and row.modelId and row.layer and source != identifier:
        raise ConfigError(
            f"{where} is of {clean_label(source)}, not of {identifier}; give files of one source."
        )
    if index >= width:
        raise ConfigError(
            f"{where} is of feature {index}, but the SAE has {width:,} features; give the source "
            f"that Neuronpedia made from this SAE."
        )
    return index


def _label(index: int, text: str, row: _Row) -> Label:
    scores = [
        one.value for one in row.scores or () if one.value is not None and 0 <= one.value <= 1
    ]
    return Label(
        index=index,
        text=text,
        labeller=LABELLER,
        score=scores[0] if scores else None,
        method=row.typeName,
        model=row.explanationModelName,
        created=row.createdAt,
        author=row.authorId,
    )


def _worth(label: Label) -> tuple[float, str]:
    return (-1 if label.score is None else label.score, label.created or "")
