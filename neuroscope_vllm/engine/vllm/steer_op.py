"""The custom op that edits the residual stream inside the compiled graph.

Which rows it edits, and how, is the content of persistent tables: changed between forward passes,
never a recapture. A row without an entry keeps its bits.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from neuroscope_vllm.core.steering.arithmetic import activations, change

# Columns of the tables.
ENTRY, POSITION = 0, 1
USED, FIRST, END, GATE, MEETS = range(5)
PER_ACTIVATION, CONSTANT, SHARE, BIAS, THRESHOLD, NORMED, ABOVE = range(7)
NEVER = -(1 << 30)

_PAIRS_AT_ONCE = 2048
"""Of a row and one of its slots; each takes three vectors."""

library = torch.library.Library("neuroscope", "FRAGMENT")
library.define(
    "steer(Tensor(a!) hidden, Tensor residual, Tensor rows, Tensor last, Tensor(b!) met,"
    " Tensor slots, Tensor numbers, Tensor reading, Tensor writing, Tensor(c!) activation,"
    " str? input_norm) -> ()"
)


def steer(
    hidden: Tensor,
    residual: Tensor,
    rows: Tensor,
    last: Tensor,
    met: Tensor,
    slots: Tensor,
    numbers: Tensor,
    reading: Tensor,
    writing: Tensor,
    activation: Tensor,
    input_norm: str | None,
) -> None:
    """x = hidden + residual of each row becomes

        x + sum over its slots of (per_activation f + constant) d - share x

    in place in `hidden`, all from the same x; f goes to `activation`, and to `met` what it meets.

    Args:
        hidden, residual: [n, d_model], model dtype.
        rows: int32 [max_rows, 2], ENTRY (-1: none) and POSITION.
        last: int32 [entries, rules], tokens after it for which a rule stays met.
        met: int32 [entries, rules], latest position that met the rule; NEVER.
        slots: int32 [entries, slots, 5], USED to MEETS: positions [FIRST, END), numbers of rules.
        numbers: float32 [entries, slots, 7], PER_ACTIVATION to ABOVE.
        reading, writing: float32 [entries, slots, d_model].
        activation: float32 [max_rows, slots]; written where a slot of the row was live.
        input_norm: As in `SAEInfo`.
    """
    entry, position = rows[: len(hidden), ENTRY], rows[: len(hidden), POSITION]
    if not (entry >= 0).any():
        return
    live = _live(entry, position, slots, met, last)
    row, slot = live.nonzero(as_tuple=True)
    # Whole rows together, so that all slots of a row see the same x.
    bounds = _chunks(row)
    for start, stop in itertools.pairwise(bounds):
        r, s = row[start:stop], slot[start:stop]
        e = entry[r].long()
        x = hidden[r].float() + residual[r].float()
        number, write = numbers[e, s], writing[e, s]
        f = activations(x, reading[e, s], number[:, BIAS], number[:, THRESHOLD], input_norm)
        activation[r, s] = f
        amount = number[:, PER_ACTIVATION] * f + number[:, CONSTANT]
        delta = change(amount, write, number[:, NORMED], x, input_norm)
        delta -= number[:, SHARE, None] * x
        edited, at = r.unique_consecutive(return_inverse=True)
        total = torch.zeros(len(edited), x.shape[1]).index_add_(0, at, delta)
        hidden[edited] = (hidden[edited].float() + total).to(hidden.dtype)
        meets = slots[e, s, MEETS]
        now = (meets >= 0) & (f > number[:, ABOVE])
        rule = (e * met.shape[1] + meets)[now]
        met.view(-1).scatter_reduce_(0, rule, position[r][now], "amax")


def _live(entry: Tensor, position: Tensor, slots: Tensor, met: Tensor, last: Tensor) -> Tensor:
    """bool [n, slots]: used, at its positions, and its rule met."""
    e = entry.clamp(min=0).long()
    slot, at = slots[e], position.unsqueeze(1)
    live = (entry >= 0).unsqueeze(1) & (slot[..., USED] > 0)
    live &= (slot[..., FIRST] <= at) & (at < slot[..., END])
    gate = slot[..., GATE]
    rule = gate.clamp(min=0).long()
    since = at - met[e].gather(1, rule)
    return live & ((gate < 0) | ((since >= 0) & (since <= last[e].gather(1, rule))))


def _chunks(row: Tensor) -> list[int]:
    """Bounds of stretches of about `_PAIRS_AT_ONCE` pairs that split no row."""
    if len(row) <= _PAIRS_AT_ONCE:
        return [0, len(row)]
    ends = (row.diff().nonzero().squeeze(1) + 1).tolist()
    bounds = [0]
    for end in ends:
        if end - bounds[-1] >= _PAIRS_AT_ONCE:
            bounds.append(end)
    return [*bounds, len(row)]


library.impl("steer", steer, "CPU")
torch.library.register_fake("neuroscope::steer", lambda *args: None)
