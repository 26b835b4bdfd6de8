"""A record as a heat map: what its rows, columns and cells say, in whatever form. Torch-free."""

from __future__ import annotations

from neuroscope_vllm.core.patching.record import Column, Patching, Row

ALL = "all"
"""Heading of the patches of every column at once."""


def title(record: Patching) -> str:
    what = "residuals" if record.kind == "residual" else "features"
    return f"Patching {what}: recovered share of {_token(record.answer.text)} over " + _token(
        record.wrong.text
    )


def about(record: Patching) -> list[str]:
    """What a reader has to know of it."""
    clean, corrupted = "the clean run", "the corrupted run"
    if record.direction == "denoising":
        what = f"{clean} put into {corrupted}: 0 is no effect, 1 the clean answer"
    else:
        what = f"{corrupted} put into {clean}: 1 is no effect, 0 the corrupted answer"
    read = "" if record.sae_input in (None, "raw") else f", reading {record.sae_input}"
    return [
        f"{record.model}, on {record.backend}",
        *(f"layer {source.layer}: {source.sae}{read}" for source in record.saes),
        what,
        f"clean, logit difference {record.metric_of_clean:.3f}: {printable(record.clean.text)}",
        f"corrupted, {record.metric_of_corrupted:.3f}: {printable(record.corrupted.text)}",
    ]


def row_name(row: Row) -> str:
    if row.features is None:
        return f"layer {row.layer}"
    if len(row.features) == 1:
        return f"layer {row.layer} [{row.features[0]}]"
    return f"layer {row.layer}, {len(row.features)} features"


def column_name(record: Patching, column: Column) -> str:
    """The token that is patched, and what is put there where that differs."""
    into = _token(record.into.tokens[column.position])
    if column.source is None:
        return f"{into} (unmatched)"
    source = _token(record.source.tokens[column.source])
    return into if into == source else f"{into} ← {source}"


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _token(text: str) -> str:
    return printable(text).strip() or repr(text)
