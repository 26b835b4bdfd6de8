"""The progress of what takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from neuroscope_vllm.cli.supervise import console

if TYPE_CHECKING:
    from neuroscope_vllm.engine.corpus_run import Done


@contextlib.contextmanager
def progress(samples: int) -> Iterator[Callable[[Done], None]]:
    """A bar with tokens/s and the time left; yields what to call with each checkpoint."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("samples"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began: list[tuple[float, int]] = []
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=samples, rate="")

        def report(done: Done) -> None:
            now = bar.get_time()
            if not began:
                began.append((now, done.tokens))
            since, before = began[0]
            rate = f"{(done.tokens - before) / (now - since):,.0f} tokens/s" if now > since else ""
            bar.update(task, completed=done.sequences, rate=rate)

        yield report


@contextlib.contextmanager
def counted(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields what to call with how many are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeLeft())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)
