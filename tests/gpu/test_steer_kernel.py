"""The Triton kernel on a GPU, launched or replayed from a graph, does what the CPU's op does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuroscope_vllm.engine.vllm import steer_op  # noqa: F401  # defines the op
from tests.support.steer_cases import (
    BITS,
    CASES,
    D_MODEL,
    NORMS,
    ROWS,
    Case,
    Op,
    assert_same,
    beside_broken_rows,
    clamped_to_what_is_there,
    just_at_a_threshold,
    run,
)

pytestmark = pytest.mark.gpu
STEER: Op = torch.ops.neuroscope.steer
WRITTEN = ("hidden", "met", "activation")
NAMES = ("hidden", "residual", "rows", "last", "met", "slots", "numbers", "reading", "writing",
         "activation")  # fmt: skip


def launched(*arguments: Any) -> None:
    """The op on copies of the CPU's tensors; what it writes is copied back."""
    *given, norm = arguments
    there = [tensor.cuda() for tensor in given]
    STEER(*there, norm)
    for name, mine, theirs in zip(NAMES, given, there, strict=True):
        if name in WRITTEN:
            mine.copy_(theirs)


class Replayed:
    """The op captured once, over as many rows as a step may have; tables change in between."""

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._there: list[Tensor] = []

    def __call__(self, *arguments: Any) -> None:
        *given, norm = arguments
        count = len(given[0])
        padding = torch.zeros(ROWS - count, D_MODEL, dtype=given[0].dtype)
        full = [torch.cat([tensor, padding]) for tensor in given[:2]] + given[2:]
        if self._graph is None:
            self._capture(full, norm)
        assert self._graph is not None
        for mine, theirs in zip(full, self._there, strict=True):
            theirs.copy_(mine)
        self._graph.replay()
        torch.cuda.synchronize()
        for name, mine, theirs in zip(NAMES, given, self._there, strict=True):
            if name in WRITTEN:
                mine.copy_(theirs[: len(mine)])

    def _capture(self, full: list[Tensor], norm: str | None) -> None:
        self._there = [tensor.cuda() for tensor in full]
        STEER(*self._there, norm)  # Triton compiles before the capture
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            STEER(*self._there, norm)


@pytest.mark.parametrize("name", CASES)
def test_launched(name: str) -> None:
    case = Case(*CASES[name])
    assert_same(case, run(case, launched), run(case, STEER))


@pytest.mark.parametrize("name", CASES)
def test_replayed_from_a_graph(name: str) -> None:
    case = Case(*CASES[name])
    assert_same(case, run(case, Replayed()), run(case, STEER))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "compared", [clamped_to_what_is_there, just_at_a_threshold, beside_broken_rows]
)
@pytest.mark.parametrize("dtype", BITS)
def test_no_bit_changes(compared: Any, norm: str | None, dtype: torch.dtype) -> None:
    before, after = compared(launched, norm, dtype)
    assert torch.equal(before.view(BITS[dtype]), after.view(BITS[dtype]))
