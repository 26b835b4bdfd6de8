"""`neuroscope::steer` on CUDA: `steer_rows` says what it does, and these kernels do it.

One program a row, whatever the tables hold: no allocation, no look from the host, so a captured
graph replays with whatever the tables hold then.
"""

# Triton's language is not the Python that it looks like.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

from torch import Tensor
from vllm.triton_utils import tl, triton

from neuroscope_vllm.core.sae.info import LAYER_NORM, RMS
from neuroscope_vllm.core.sae.sae import LAYER_NORM_EPS
from neuroscope_vllm.engine.serving import steer_rows

_ROW, _SLOT, _NUMBER = tl.constexpr(2), tl.constexpr(5), tl.constexpr(7)  # columns
_POSITION = tl.constexpr(steer_rows.POSITION)
_FIRST, _END = tl.constexpr(steer_rows.FIRST), tl.constexpr(steer_rows.END)
_GATE, _MEETS = tl.constexpr(steer_rows.GATE), tl.constexpr(steer_rows.MEETS)
_CONSTANT = tl.constexpr(steer_rows.CONSTANT)
_BIAS, _THRESHOLD = tl.constexpr(steer_rows.BIAS), tl.constexpr(steer_rows.THRESHOLD)
_NORMED, _ABOVE = tl.constexpr(steer_rows.NORMED), tl.constexpr(steer_rows.ABOVE)
_SINK_NORM = tl.constexpr(steer_rows.SINK_NORM)
_EPS = tl.constexpr(LAYER_NORM_EPS)


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
    """As `steer_rows.steer`; the rows of `hidden` and `residual` are contiguous each."""
    grid = (hidden.shape[0],)
    d_model, num_slots, num_rules = hidden.shape[1], slots.shape[1], met.shape[1]
    columns, block = triton.next_power_of_2(d_model), triton.next_power_of_2(num_slots)
    _edit[grid](
        hidden,
        residual,
        rows,
        last,
        met,
        slots,
        numbers,
        reading,
        writing,
        activation,
        hidden.stride(0),
        residual.stride(0),
        d_model,
        num_slots,
        num_rules,
        IS_RMS=input_norm == RMS,
        IS_LAYER_NORM=input_norm == LAYER_NORM,
        COLUMNS=columns,
        SLOTS=block,
        num_warps=min(max(columns // 512, 1), 16),
    )
    # Only when no row looks at `met` any more.
    _record[grid](
        rows, met, slots, numbers, activation, num_slots, num_rules, SLOTS=block, num_warps=1
    )


@triton.jit
def _edit(
    hidden,
    residual,
    rows,
    last,
    met,
    slots,
    numbers,
    reading,
    writing,
    activation,
    hidden_stride,
    residual_stride,
    d_model,
    num_slots,
    num_rules,
    IS_RMS: tl.constexpr,
    IS_LAYER_NORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(rows + row * _ROW).to(tl.int64)
    if entry < 0:
        return
    position = tl.load(rows + row * _ROW + _POSITION)
    live = _at_positions(slots, entry, position, num_slots, SLOTS)
    gate = _column(slots, entry, _GATE, num_slots, SLOTS)
    gated = live & (gate >= 0)
    since = position - tl.load(met + entry * num_rules + gate, mask=gated, other=0)
    held = (since >= 0) & (since <= tl.load(last + entry * num_rules + gate, mask=gated, other=0))
    live = live & ((gate < 0) | held)
    bits = tl.sum(live.to(tl.int32) << tl.arange(0, SLOTS), axis=0)
    if bits == 0:
        return

    column = tl.arange(0, COLUMNS)
    inside = column < d_model
    place = hidden + row * hidden_stride + column
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x = before + tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(
        tl.float32
    )
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    seen = x
    scale = 1.0
    if IS_RMS:
        scale = tl.sqrt(tl.sum(x * x, axis=0) / d_model)
        seen = x / scale
    if IS_LAYER_NORM:
        centred = tl.where(inside, x - tl.sum(x, axis=0) / d_model, 0.0)
        scale = tl.sqrt(tl.sum(centred * centred, axis=0) / (d_model - 1))
        seen = centred / (scale + _EPS)

    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for slot in range(num_slots):
        if (bits >> slot) & 1:
            pair = entry * num_slots + slot
            number = numbers + pair * _NUMBER
            vector = pair * d_model + column
            read = tl.load(reading + vector, mask=inside, other=0.0)
            pre = tl.sum(seen * read, axis=0) + tl.load(number + _BIAS)
            heard = norm <= tl.load(number + _SINK_NORM)
            f = tl.where((pre > tl.load(number + _THRESHOLD)) & heard, pre, 0.0)
            tl.store(activation + row * num_slots + slot, f)
            amount = tl.load(number) * f + tl.load(number + _CONSTANT)
            if amount != 0:
                if IS_RMS or IS_LAYER_NORM:
                    amount *= tl.where(tl.load(number + _NORMED) > 0, scale, 1.0)
                total += amount * tl.load(writing + vector, mask=inside, other=0.0)
    tl.store(place, tl.where(total == 0, before, before + total), mask=inside)


@triton.jit
def _record(rows, met, slots, numbers, activation, num_slots, num_rules, SLOTS: tl.constexpr):
    """What the conditions met; they have no gate."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(rows + row * _ROW).to(tl.int64)
    if entry < 0:
        return
    position = tl.load(rows + row * _ROW + _POSITION)
    slot = tl.arange(0, SLOTS)
    rule = _column(slots, entry, _MEETS, num_slots, SLOTS)
    looks = _at_positions(slots, entry, position, num_slots, SLOTS) & (rule >= 0)
    f = tl.load(activation + row * num_slots + slot, mask=looks, other=0.0)
    number = numbers + (entry * num_slots + slot) * _NUMBER
    now = looks & (f > tl.load(number + _ABOVE, mask=looks, other=0.0))
    tl.atomic_max(met + entry * num_rules + rule, position, mask=now)


@triton.jit
def _at_positions(slots, entry, position, num_slots, SLOTS: tl.constexpr):
    """Which of the entry's slots are used at a position."""
    used = _column(slots, entry, 0, num_slots, SLOTS) > 0
    first = _column(slots, entry, _FIRST, num_slots, SLOTS)
    return used & (first <= position) & (position < _column(slots, entry, _END, num_slots, SLOTS))


@triton.jit
def _column(slots, entry, column: tl.constexpr, num_slots, SLOTS: tl.constexpr):
    """One number of each of the entry's slots, 0 past their end."""
    slot = tl.arange(0, SLOTS)
    place = slots + (entry * num_slots + slot) * _SLOT + column
    return tl.load(place, mask=slot < num_slots, other=0)
