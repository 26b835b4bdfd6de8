"""`neuroscope patch` in a terminal: layers by positions, as wide as there is room."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuroscope_vllm.core.patching.heat import ALL, about, column_name, row_name, title
from neuroscope_vllm.core.patching.record import Patching

WIDTH = 8
"""Of a column."""
BETWEEN = 2
SHOWN = 5
"""Strongest patches listed."""
STYLES = ((0.75, "bold yellow"), (0.25, "yellow"), (0.1, ""), (0.0, "dim"))
"""From an effect of this size on."""


def print_heat(record: Patching) -> None:
    console = Console()
    console.print(Text(title(record), style="bold"))
    for line in about(record):
        console.print(Text(line, style="dim"))
    names = [row_name(row) for row in record.rows]
    widest = max(map(cell_len, names))
    # The last column, all at once, stands in each stripe.
    room = max((console.width - widest) // (WIDTH + BETWEEN) - 1, 1)
    for start in range(0, len(record.columns), room):
        console.print()
        console.print(_stripe(record, names, start, min(start + room, len(record.columns))))
    console.print()
    for row, column, recovered in record.strongest()[:SHOWN]:
        where = f"{row_name(row)}, position {column.position}, {column_name(record, column)}"
        console.print(Text.assemble(_cell(recovered, record), f"  {where}"))


def _stripe(record: Patching, names: list[str], start: int, stop: int) -> Table:
    columns = record.columns[start:stop]
    table = Table(box=None, pad_edge=False, padding=(0, BETWEEN, 0, 0))
    table.add_column("")
    for column in columns:
        name = column_name(record, column).replace(" ← ", "\n←").splitlines()
        lines = [str(column.position), *(_short(line) for line in name)]
        table.add_column(Text("\n".join(lines)), justify="right", min_width=WIDTH, no_wrap=True)
    table.add_column(ALL, justify="right", min_width=WIDTH)
    for name, row in zip(names, record.rows, strict=True):
        values = (*row.recovered[start:stop], row.recovered_of_all)
        table.add_row(Text(name), *(_cell(value, record) for value in values))
    return table


def _cell(value: float | None, record: Patching) -> Text:
    if value is None:
        return Text("–", style="dim")
    effect = abs(value - record.untouched)
    style = next((style for least, style in STYLES if effect >= least), "")
    return Text(f"{value:z.3f}", style=style)


def _short(text: str) -> str:
    return text if cell_len(text) <= WIDTH else set_cell_size(text, WIDTH - 1) + "…"
