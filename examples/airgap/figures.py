"""Markdown tables of what the benches wrote, with the card's name: `figures.py OUT`.

Each OUT/*.json is one report of `neuroscope bench … --json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    card = (folder / "card.txt").read_text().strip()
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text())
        print(f"## {file.stem}, {card}\n")
        rows = [row for value in report.values() for row in _rows(value)]
        given = {name: value for name, value in report.items() if not _rows(value)}
        print(", ".join(f"{name} {value}" for name, value in given.items()) + "\n")
        print(table(rows))


def _rows(value: Any) -> list[dict[str, Any]]:
    """The rows of a table: a list of objects, or objects by name."""
    if isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values()):
        return [{"": name, **one} for name, one in value.items()]
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return value
    return []


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[str(row.get(name, "")) for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
