"""Files of a JSON object a line, which grow while a run lasts and survive its end. Torch-free."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Journal:
    """Appends records to a file, each at once. A context manager.

    A last line that a kill cut off goes before the first is added; so one process alone may write
    (see `artefacts.only_writer`).
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        _end_last_line(path)

    def add(self, record: msgspec.Struct) -> None:
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _end_last_line(path: Path) -> None:
    """Cut off a last line that is no JSON, and give one that is the end it lacks."""
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    if start == len(content):
        return
    with path.open("r+b") as file:
        try:
            msgspec.json.decode(content[start:])
        except msgspec.DecodeError:
            file.truncate(start)
        else:
            file.seek(0, 2)
            file.write(b"\n")
