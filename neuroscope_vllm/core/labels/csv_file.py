"""Labels as CSV, for spreadsheets: `index,text` and any other fields of a label. Torch-free."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import Label, LabelSet, NoLabels, one_labeller

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""A cell that a spreadsheet may compute, quoted or not: it is written with one quote more."""
FIELDS = tuple(field.name for field in msgspec.structs.fields(Label))


def read_csv(path: Path, labeller: str | None = None) -> LabelSet:
    """Labels of one labeller; the first line names the columns, and an empty cell is not known.

    Args:
        labeller: Whose labels they are to be; by default the column `labeller` says.

    Raises:
        ConfigError: It cannot be read, has other columns, or a row (which is named) is no label, or
            is of another labeller than the first.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = one_labeller(path, _labels(path, csv.DictReader(file, strict=True), labeller))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no CSV in UTF-8 ({error}); export it again.") from error
    if found is None:
        raise NoLabels(f"{path} holds no labels below its column names.")
    return found


def to_csv(labels: LabelSet) -> str:
    """All fields, by ascending index; what is not known is empty.

    Texts that a spreadsheet would take for formulas get a quote before, which `read_csv` takes off.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _inert(getattr(label, name)) for name in FIELDS} for label in labels)
    return text.getvalue()


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _as_given(cell: Any) -> Any:
    """Without the quote of `_inert`. Cells beyond the columns come as a list."""
    quoted = isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell)
    return cell[1:] if quoted else cell


def _labels(
    path: Path, rows: csv.DictReader[str], labeller: str | None
) -> Iterator[tuple[int, Label]]:
    columns = set(rows.fieldnames or ())
    if unknown := columns - set(FIELDS):
        raise ConfigError(
            f"{path} has a column {min(unknown)!r}; the columns are {', '.join(FIELDS)}."
        )
    needed = {"index", "text"} if labeller else {"index", "text", "labeller"}
    if missing := needed - columns:
        first = min(missing)
        hint = " (or give one with --labeller)" if first == "labeller" else ""
        raise ConfigError(
            f"{path} has no column {first!r}{hint}; its first line names the columns."
        )
    for row in rows:
        known = {name: _as_given(cell) for name, cell in row.items() if cell}
        if labeller:
            known["labeller"] = labeller
        try:
            yield rows.line_num, msgspec.convert(known, Label, strict=False)
        except (msgspec.ValidationError, TypeError) as error:
            raise ConfigError(
                f"line {rows.line_num} of {path} is not a label ({error})."
            ) from error
