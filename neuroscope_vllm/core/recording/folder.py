"""The folder of a recording: DIR/date=YYYY-MM-DD/<epoch>-<number>.parquet, days in UTC.

It holds what users wrote, so that only its owner may read what is made here.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from neuroscope_vllm.core.errors import ConfigError

PARTIAL = ".partial"
ABANDONED_S = 600.0
"""A file that is still being written after so long will not be finished."""
_DAY = re.compile(r"date=(\d{4}-\d\d-\d\d)")
_OURS = re.compile(rf"\.?[0-9a-f]+-\d+\.parquet({re.escape(PARTIAL)})?")


def prepare(folder: str | os.PathLike[str]) -> Path:
    """Make the folder of a recording, if it is not there, and see that files can be made in it.

    Raises:
        ConfigError: They can not.
    """
    path = Path(folder).expanduser().absolute()
    probe = path / f".{os.getpid()}-{time.monotonic_ns()}"
    try:
        _make(path)
        with _private(probe):
            probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"record is {folder}, where no file can be made ({error.strerror}); name a folder that"
            " you can write to, or leave record out."
        ) from None
    return path


def day_file(folder: Path, epoch: str, number: int, when: float) -> Path:
    """Where a file of a recording lies that is written at `when`, in unix seconds."""
    day = datetime.fromtimestamp(when, UTC).date()
    return folder / f"date={day}" / f"{epoch}-{number:06d}.parquet"


def write_private(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, for its owner alone, as is the folder if that is new.

    Raises:
        OSError: It can not be written; nothing is left behind.
    """
    _make(path.parent)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with _private(partial) as descriptor:
            written = 0
            while written < len(content):
                written += os.write(descriptor, memoryview(content)[written:])
            os.fsync(descriptor)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def files(path: Path) -> list[Path]:
    """The files of a recording, oldest day first; or the one file that `path` names."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.glob("**/*.parquet") if not file.name.startswith("."))


def forget(folder: Path, days: int, now: float) -> int:
    """Remove what was recorded more than `days` whole days before today, if `days`, and what a
    process that was killed had only half written. Files that are not ours stay.

    Returns how many files went. Raises OSError.
    """
    oldest = datetime.fromtimestamp(now, UTC).date() - timedelta(days=days) if days else date.min
    gone = 0
    for day, when in _days(folder):
        for file in list(day.iterdir()):
            if _OURS.fullmatch(file.name) is None:
                continue
            half = file.name.endswith(PARTIAL) and now - file.stat().st_mtime > ABANDONED_S
            if when < oldest or half:
                file.unlink(missing_ok=True)
                gone += 1
        if when < oldest:
            with contextlib.suppress(OSError):  # something else is in it
                day.rmdir()
    return gone


def _days(folder: Path) -> Iterator[tuple[Path, date]]:
    for day in list(folder.iterdir()):
        named = _DAY.fullmatch(day.name)
        if named is None or not day.is_dir() or day.is_symlink():
            continue
        with contextlib.suppress(ValueError):  # date=2026-02-31
            yield day, date.fromisoformat(named[1])


def _make(folder: Path) -> None:
    """For its owner alone; one that is there stays as it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def _private(path: Path) -> Iterator[int]:
    """A new file, open for writing, that nobody else may read."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
