"""Whose rows are in a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepView:
    """The rows of one forward pass.

    `positions` and `token_ids` may be the engine's own device buffers cut to the step's rows, and
    valid until the next step is prepared only.
    """

    request_ids: list[str]  # internal ids, in row order
    row_starts: list[int]  # len(request_ids) + 1; rows of request i: [row_starts[i], [i + 1])
    positions: Tensor  # int[num_rows], absolute in the request's context
    token_ids: Tensor  # int[num_rows]
    first_positions: list[int]  # of each request's first row, as the host knows it

    @property
    def num_rows(self) -> int:
        return self.row_starts[-1]
