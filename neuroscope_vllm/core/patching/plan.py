"""Which runs a sweep takes, and what is made of their metrics. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from neuroscope_vllm.core.patching.metric import Ends
from neuroscope_vllm.core.patching.record import Column, Row


class Target(NamedTuple):
    """What the patches of a row are: a layer, and of its features these (None: all there is)."""

    layer: int
    features: tuple[int, ...] | None = None


class Run(NamedTuple):
    """One forward pass: a target, patched at some columns that have a source."""

    target: Target
    columns: tuple[Column, ...]


class Plan:
    """All the runs: each column of each target alone, then all columns of each target at once.

    Attributes:
        columns: As given.
        runs: In the order in which they are best run.
    """

    def __init__(self, targets: Sequence[Target], columns: Sequence[Column]) -> None:
        """`columns`: At least one of them has a source."""
        self._targets, self.columns = targets, list(columns)
        usable = tuple(column for column in columns if column.source is not None)
        # By column first: runs side by side then have the same start, which is computed once.
        runs = [Run(target, (column,)) for column in usable for target in targets]
        runs += [Run(target, usable) for target in targets]
        self.runs = list(dict.fromkeys(runs))  # all columns may be one

    def rows(self, metrics: Sequence[float], ends: Ends) -> list[Row]:
        """From the metric of each run, in the order of `runs`."""
        of = dict(zip(self.runs, metrics, strict=True))
        usable = self.runs[-1].columns
        rows = []
        for target in self._targets:
            metric = [
                None if column.source is None else of[Run(target, (column,))]
                for column in self.columns
            ]
            together = of[Run(target, usable)]
            row = Row(
                layer=target.layer,
                features=None if target.features is None else list(target.features),
                metric=metric,
                recovered=[None if m is None else ends.recovered(m) for m in metric],
                metric_of_all=together,
                recovered_of_all=ends.recovered(together),
            )
            rows.append(row)
        return rows
