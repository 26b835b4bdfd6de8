"""Edits of the residual stream, row by row.

Which rows are edited, and how, is the content of tables that change between forward passes. A row
without an entry keeps its bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from neuroscope_vllm.core.steering.arithmetic import activations, change

# Columns of the tables.
ENTRY, POSITION = 0, 1
USED, FIRST, END, GATE, MEETS = range(5)
PER_ACTIVATION, CONSTANT, BIAS, THRESHOLD, NORMED, SINK_NORM, ABOVE = range(7)
NEVER = -(1 << 30)

_ROWS_AT_ONCE = 128
"""Each takes three vectors, and three for each of its slots: what stays in a core's cache."""


def steer(
    hidden: Tensor,
    residual: Tensor | None,
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

        x + sum over its slots of (per_activation f + constant) d

    in place in `hidden`, all from the same x; f goes to `activation`, and to `met` what it meets.
    No row of a call sees what the call itself meets.

    Args:
        hidden, residual: [n, d_model], model dtype; residual None: x is hidden.
        rows: int32 [max_rows, 2], ENTRY (-1: none) and POSITION.
        last: int32 [entries, rules], tokens after it for which a rule stays met.
        met: int32 [entries, rules], latest position that met the rule; NEVER.
        slots: int32 [entries, slots, 5], USED to MEETS: positions [FIRST, END), numbers of rules;
            of GATE and MEETS a slot has one at most.
        numbers: float32 [entries, slots, 7], PER_ACTIVATION to ABOVE.
        reading, writing: float32 [entries, slots, d_model].
        activation: float32 [max_rows, slots]; written where a slot of the row was live.
        input_norm: As in `SAEInfo`.

    hidden, residual, numbers, reading and writing are on one device, the rest on the CPU.
    """
    device = hidden.device
    # Where it is about small integers, numpy is several times faster than torch.
    table = rows[: len(hidden)].numpy()
    named = (table[:, ENTRY] >= 0).nonzero()[0]
    if not len(named):
        return
    live = _live(table[named], slots.numpy(), met.numpy(), last.numpy())
    some = live.any(axis=1)
    named, live = named[some], live[some]
    for start in range(0, len(named), _ROWS_AT_ONCE):
        row = named[start : start + _ROWS_AT_ONCE]
        at, slot = live[start : start + _ROWS_AT_ONCE].nonzero()  # pairs of a row and its slot
        entry, position = table[row[at]].T
        place = torch.from_numpy(row).to(device)
        before = hidden.index_select(0, place).float()
        x = before if residual is None else before + residual.index_select(0, place).float()

        pair = torch.from_numpy(entry * slots.shape[1] + slot).to(device)
        number = numbers.flatten(0, 1).index_select(0, pair)
        per_activation, constant, bias, threshold, normed, sink_norm, above = number.unbind(1)
        alone = len(at) == len(row)
        each = x if alone else x.index_select(0, torch.from_numpy(at).to(device))
        read = reading.flatten(0, 1).index_select(0, pair)
        f = activations(each, read, bias, threshold, sink_norm, input_norm)
        active = f.cpu().numpy()
        activation.numpy()[row[at], slot] = active

        meets = slots.numpy()[entry, slot, MEETS]
        now = (meets >= 0) & (active > above.cpu().numpy())
        np.maximum.at(met.numpy(), (entry[now], meets[now]), position[now])

        amount = per_activation * f + constant
        if not amount.any():
            continue  # conditions only
        write = writing.flatten(0, 1).index_select(0, pair)
        delta = change(amount, write, normed, each, input_norm)
        total = delta if alone else _sums(delta, at)
        after = torch.where(total == 0, before, before + total)  # -0 keeps its sign
        hidden.index_copy_(0, place, after.to(hidden.dtype))


def _live(
    rows: NDArray[np.int32],
    slots: NDArray[np.int32],
    met: NDArray[np.int32],
    last: NDArray[np.int32],
) -> NDArray[np.bool_]:
    """bool [n, slots] of rows [n, 2] with an entry: used, at its positions, and its rule met."""
    entry, position = rows[:, ENTRY], rows[:, POSITION]
    slot, at = slots[entry], position[:, None]
    live = (slot[..., USED] > 0) & (slot[..., FIRST] <= at) & (at < slot[..., END])
    gated = live & (slot[..., GATE] >= 0)
    if gated.any():
        row = gated.nonzero()[0]
        rule = entry[row], slot[gated][:, GATE]
        since = position[row] - met[rule]
        live[gated] = (since >= 0) & (since <= last[rule])
    return live


def _sums(delta: Tensor, at: NDArray[np.int64]) -> Tensor:
    """The sum of each row's pairs, which lie together: delta [pairs, d_model], at [pairs]."""
    first = torch.from_numpy(np.diff(at, prepend=-1).nonzero()[0]).to(delta.device)
    # index_add_ shares out however little there is to add among all threads.
    every = torch.arange(len(delta), device=delta.device)
    return embedding_bag(every, delta, first, mode="sum")
