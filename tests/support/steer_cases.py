"""Random requests that steer, and what the formulas say becomes of their rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.sae.info import LAYER_NORM, RMS, SAEInfo
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.steering.arithmetic import Vector, direction_vector, feature_vector
from neuroscope_vllm.engine.serving.steer_rows import NEVER
from neuroscope_vllm.engine.serving.steer_tables import FOREVER, SteerTables

LAYER, D_MODEL, WIDTH = 20, 48, 32  # no power of two: the kernel has columns to spare
ENTRIES, SLOTS = 5, 5
LAST = (1, 4, 12, 0)
"""Of each rule; the fourth is not used."""
CHUNKS = (1, 1, 4)
"""Rows of a request in a step."""
ROWS = max(CHUNKS) * (ENTRIES + 1)
NORMS = (None, RMS, LAYER_NORM)
ULP = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
OPS = ("add", "clamp", "scale", "ablate", "direction", "read")


class Slot(NamedTuple):
    op: str
    feature: int
    value: float = 0.0
    first: int = 0
    end: int = FOREVER
    gate: int = -1
    meets: int = -1
    above: float = 0.0


class Step(NamedTuple):
    """One call.

    Attributes:
        rows: (entry, position) of each, entry -1 where nothing is asked for.
        hidden, residual: [n, d_model].
        earlier: (entry, rule) to the position that met it at an earlier layer.
    """

    rows: list[tuple[int, int]]
    hidden: Tensor
    residual: Tensor
    earlier: dict[tuple[int, int], int]


class Case:
    """Requests, an entry each, with random slots, and some steps of theirs."""

    def __init__(self, seed: int, norm: str | None, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.norm, self.dtype = norm, dtype
        self.sink_norm = (
            3 * (2 * D_MODEL) ** 0.5 if seed % 2 == 0 else math.inf
        )  # some rows', or none's

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        info = SAEInfo(
            source="random", format="test", architecture="jumprelu", d_model=D_MODEL, width=WIDTH,
            input_norm=norm,
        )  # fmt: skip
        self.sae = SAE(
            normal(D_MODEL, WIDTH) / 3, normal(WIDTH), normal(WIDTH).abs() / 4,
            normal(WIDTH, D_MODEL) / 3, normal(D_MODEL), info,
        )  # fmt: skip
        self.direction = normal(D_MODEL)
        pick = Random(seed)
        self.entries = [
            [self._slot(pick) for _ in range(pick.randint(0, SLOTS))] for _ in range(ENTRIES)
        ]
        self.steps, position = [], [0] * ENTRIES
        for _ in range(4):
            rows: list[tuple[int, int]] = []
            for entry in pick.sample([*range(ENTRIES), -1], ENTRIES):
                count = pick.choice(CHUNKS)
                start = 0 if entry < 0 else position[entry]
                rows += [(entry, start + i) for i in range(count)]
                if entry >= 0:
                    position[entry] += count
            sizes = torch.rand(len(rows), 1, generator=draw) * 4 + 0.1
            hidden, residual = normal(len(rows), D_MODEL), normal(len(rows), D_MODEL)
            hidden[:, 7] = -0.0
            hidden, residual = (hidden * sizes).to(dtype), (residual * sizes).to(dtype)
            some = [row for row in rows if row[0] >= 0 and pick.random() < 0.2]
            earlier = {(entry, pick.randrange(3)): position for entry, position in some}
            self.steps.append(Step(rows, hidden, residual, earlier))

    def _slot(self, pick: Random) -> Slot:
        op, gate, meets = pick.choice(OPS), -1, -1
        if op == "read" or pick.random() < 0.4:
            meets = pick.randrange(3)
        elif pick.random() < 0.6:
            gate = pick.randrange(3)
        first, end = pick.choice([(0, FOREVER), (3, FOREVER), (0, 5)])
        feature, value, above = pick.randrange(WIDTH), pick.uniform(-8, 8), pick.uniform(-1, 2)
        return Slot(op, feature, value, first, end, gate, meets, above)

    def tables(self) -> SteerTables:
        made = SteerTables(
            {LAYER: self.norm}, num_rows=ROWS, d_model=D_MODEL, entries=ENTRIES, num_slots=SLOTS
        )
        for entry, slots in enumerate(self.entries):
            made.clear_entry(entry, list(LAST))
            for number, slot in enumerate(slots):
                self.write(made, entry, number, slot)
        return made

    def write(self, made: SteerTables, entry: int, number: int, slot: Slot) -> None:
        per_activation, constant = {
            "add": (0.0, slot.value),
            "clamp": (-1.0, slot.value),
            "scale": (slot.value - 1, 0.0),
            "ablate": (-1.0, 0.0),
            "direction": (0.0, slot.value),
            "read": (0.0, 0.0),
        }[slot.op]
        made.write(
            entry,
            LAYER,
            number,
            self._vector(slot),
            per_activation=per_activation,
            constant=constant,
            first=slot.first,
            end=slot.end,
            gate=slot.gate,
            meets=slot.meets,
            above=slot.above,
        )

    def _vector(self, slot: Slot) -> Vector:
        if slot.op == "direction":
            return direction_vector(self.direction)
        return feature_vector(self.sae, slot.feature, self.sink_norm)

    def change(self, slot: Slot, x: Tensor, f: float) -> Tensor:
        """What a slot adds to a residual x [d_model], from the formulas."""
        size = {
            None: 1.0,
            RMS: float(x.norm()) / D_MODEL**0.5,
            LAYER_NORM: float(x.std()),
        }[self.norm]
        d = self.sae.W_dec[slot.feature].double() * size
        v = slot.value
        return {
            "add": lambda: v * d,
            "clamp": lambda: (v - f) * d,
            "scale": lambda: (v - 1) * f * d,
            "ablate": lambda: -f * d,
            "direction": lambda: v * self.direction.double(),
            "read": lambda: 0 * d,
        }[slot.op]()


class Outcome(NamedTuple):
    """Of the steps of a case: `hidden` of each, then what the tables hold."""

    hidden: list[Tensor]
    activation: list[Tensor]
    met: list[Tensor]


Op = Callable[..., None]


def run(case: Case, op: Op) -> Outcome:
    found = Outcome([], [], [])
    tables = case.tables()
    for step in case.steps:
        hidden = step.hidden.clone()
        for rule, at in step.earlier.items():
            tables.get_buffer("met")[rule] = at
        call(op, tables, case, step.rows, hidden, step.residual)
        found.hidden.append(hidden)
        found.activation.append(tables.activation(LAYER)[: len(hidden)].clone())
        found.met.append(tables.get_buffer("met").clone())
    return found


def call(
    op: Op,
    tables: SteerTables,
    case: Case,
    rows: list[tuple[int, int]],
    hidden: Tensor,
    residual: Tensor,
) -> None:
    tables.clear_rows()
    tables.fill_rows(torch.tensor(rows, dtype=torch.int32).numpy())
    tables.activation(LAYER).fill_(torch.nan)
    op(hidden, residual, *arguments(tables), case.norm)


def arguments(tables: SteerTables) -> list[Tensor]:
    of_layer = [f"{name}_{LAYER}" for name in ("slots", "numbers", "reading", "writing")]
    names = ("rows", "last", "met", *of_layer, f"activation_{LAYER}")
    return [tables.get_buffer(name) for name in names]


def expected(case: Case) -> Outcome:
    """Row by row, slot by slot."""
    met: dict[tuple[int, int], int] = {}
    found = Outcome([], [], [])
    for step in case.steps:
        met |= step.earlier
        hidden, before = step.hidden.clone(), dict(met)
        activation = torch.full((len(hidden), SLOTS), torch.nan)
        for i, (entry, position) in enumerate(step.rows):
            x = step.hidden[i].float() + step.residual[i].float()
            f, total = case.sae.encode(x[None])[0], torch.zeros(D_MODEL, dtype=torch.float64)
            if x.norm() > case.sink_norm:
                f = torch.zeros_like(f)
            for number, slot in enumerate(case.entries[entry] if entry >= 0 else []):
                since = position - before.get((entry, slot.gate), -1000)
                held = slot.gate < 0 or 0 <= since <= LAST[slot.gate]
                if not (slot.first <= position < slot.end and held):
                    continue
                fires = 0.0 if slot.op == "direction" else float(f[slot.feature])
                activation[i, number] = fires
                total += case.change(slot, x.double(), fires)
                if slot.meets >= 0 and fires > slot.above:
                    rule = entry, slot.meets
                    met[rule] = max(met.get(rule, -1), position)
            changed = total != 0
            hidden[i][changed] = (step.hidden[i].double() + total).to(case.dtype)[changed]
        found.hidden.append(hidden)
        found.activation.append(activation)
        table = torch.full((ENTRIES, len(LAST)), NEVER, dtype=torch.int32)
        for (entry, rule), position in met.items():
            table[entry, rule] = position
        found.met.append(table)
    return found


def assert_same(case: Case, found: Outcome, wanted: Outcome) -> None:
    """Equal to a rounding of float32; rows that nothing edits to the bit."""
    ulp, bits = ULP[case.dtype], BITS[case.dtype]
    kinds = set()
    for i, step in enumerate(case.steps):
        torch.testing.assert_close(found.hidden[i], wanted.hidden[i], rtol=ulp, atol=2e-5)
        still = (wanted.hidden[i].view(bits) == step.hidden.view(bits)).all(1)
        assert torch.equal(found.hidden[i][still].view(bits), step.hidden[still].view(bits))
        kinds |= set(still.tolist())
        torch.testing.assert_close(
            found.activation[i], wanted.activation[i], rtol=1e-5, atol=1e-5, equal_nan=True
        )
        assert torch.equal(found.met[i], wanted.met[i])
    assert kinds == {True, False}, "the case tests nothing"


def clamped_to_what_is_there(op: Op, norm: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(hidden as it was, hidden after), of a row whose feature fires and one whose does not."""
    case = Case(1, norm, dtype)
    step = Step([(0, 0), (1, 0)], case.steps[0].hidden[:2], case.steps[0].residual[:2], {})
    f = case.sae.encode(step.hidden.float() + step.residual.float())
    picked = [int(f[0].argmax()), int(f[1].argmin())]
    case.entries[:2] = [[Slot("read", feature)] for feature in picked]
    tables, hidden = case.tables(), step.hidden.clone()
    call(op, tables, case, step.rows, hidden, step.residual)
    there = tables.activation(LAYER)[:2, 0].tolist()
    assert there[0] > there[1] == 0
    for entry, feature in enumerate(picked):
        case.write(tables, entry, 0, Slot("clamp", feature, there[entry]))
    call(op, tables, case, step.rows, hidden, step.residual)
    return step.hidden, hidden


def just_at_a_threshold(op: Op, norm: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(hidden as it was, hidden after), of rows whose features are at their limits, not above."""
    case = Case(1, norm, dtype)
    case.sae.b_enc[3] = case.sae.threshold[3] = 0.75
    step = Step([(0, 0), (1, 0)], case.steps[0].hidden[:2].clone(), case.steps[0].residual[:2], {})
    f = case.sae.encode(step.hidden.float() + step.residual.float())
    step.hidden[0], step.residual[0] = 0, 0
    case.entries[:2] = [[Slot("scale", 3, 5.0)], [Slot("read", int(f[1].argmax()))]]
    tables, hidden = case.tables(), step.hidden.clone()
    call(op, tables, case, step.rows, hidden, step.residual)
    there = float(tables.activation(LAYER)[1, 0])
    assert there > 0
    for above, position in ((there, NEVER), (there * 0.99, 0)):
        case.write(tables, 1, 0, case.entries[1][0]._replace(meets=2, above=above))
        call(op, tables, case, step.rows, hidden, step.residual)
        assert int(tables.get_buffer("met")[1, 2]) == position
    return step.hidden, hidden


def beside_broken_rows(op: Op, norm: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows beside an ordinary one, rows beside infinities and NaN), all edited alike."""
    case = Case(1, norm, dtype)
    case.entries[0] = [Slot("clamp", 1, 3.0), Slot("add", 2, 1.0), Slot("direction", 0, 2.0)]
    step = case.steps[0]
    after = []
    for broken in (None, torch.nan, torch.inf):
        hidden = step.hidden[:4].clone()
        if broken is not None:
            hidden[::2, :3] = broken
        call(op, case.tables(), case, [(0, i) for i in range(4)], hidden, step.residual[:4])
        after.append(hidden[1::2])
    return after[0].repeat(2, 1), torch.cat(after[1:])


CASES = {
    f"{norm}-{str(dtype)[6:]}-{seed}": (2 * i + seed, norm, dtype)
    for i, (norm, dtype) in enumerate(itertools.product(NORMS, BITS))
    for seed in range(2)
}
