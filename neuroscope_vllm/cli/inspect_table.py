"""`neuroscope inspect` in a terminal: a row a token, coloured by the strength of its features."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuroscope_vllm.core.events import Feature
from neuroscope_vllm.core.inspection.record import Inspection, Token, Tracked
from neuroscope_vllm.core.labels import clean_label

PART = "·"
"""A token that is only a part of a character; the last part bears its text."""
MAX_WORD = 16
SHOWN = 3
"""Features a token."""
STYLES = ((0.5, "bold yellow"), (0.2, "yellow"), (0.0, ""))
"""From this share of the largest score in the text on."""


def print_tables(records: Iterable[Inspection], headings: Iterable[str]) -> None:
    console = Console()
    for record, heading in zip(records, headings, strict=True):
        for site in record.sites:
            tokens = [token for token in record.tokens if token.layer == site.layer]
            tracked = [feature for feature in record.features if feature.layer == site.layer]
            table = Table(title=Text(f"{printable(heading)}, layer {site.layer}"), expand=True)
            words = [repr(token.token) if token.token else PART for token in tokens]
            widest = min(max(map(cell_len, ("token", *words))), MAX_WORD)
            table.add_column("token", width=widest, overflow="fold")
            table.add_column("L0", justify="right")
            for feature in tracked:
                table.add_column(f"[{feature.index}]".replace("[", r"\["), justify="right")
            table.add_column(
                f"best features by {site.ranking}, with activations", ratio=1, no_wrap=True
            )
            best = [token.top_features[0].score for token in tokens if token.top_features]
            most = max([*best, 0.0])
            for at, (token, word) in enumerate(zip(tokens, words, strict=True)):
                values = (feature.activations[at] for feature in tracked)
                table.add_row(
                    Text(word, style="" if token.top_features else "dim"),
                    "" if token.l0 is None else str(token.l0),
                    *("" if value is None else f"{value:.3g}" for value in values),
                    _strongest(token, most),
                )
            console.print(table)
            for feature in tracked:
                console.print(Text(f"[{feature.index}] {_label(feature)}"))


def _strongest(token: Token, most: float) -> Text:
    if not token.top_features:
        return Text(token.note or "no active feature", style="dim")
    return Text("\n").join(_line(feature, most) for feature in token.top_features[:SHOWN])


def _line(feature: Feature, most: float) -> Text:
    share = feature.score / most if most > 0 else 0.0
    style = next((style for least, style in STYLES if share >= least), "")
    line = Text(f"{feature.activation:7.3g} ", style=style)
    line.append(f"[{feature.index}] ", style="dim")
    return line.append(_label(feature), style=style)


def _label(feature: Feature | Tracked) -> str:
    label = clean_label(feature.label or "(no label)")
    return f"{label} (unreliable)" if feature.unreliable else label


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
