"""Steering as a client or an operator writes it. Torch-free.

    {"op": "add", "layer": 20, "feature": 4521, "value": 80}

`settle` turns it into what a worker applies.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Op = Literal["add", "clamp", "scale", "ablate", "direction"]
Unit = Literal["raw", "max"]
Positions = Literal["all", "prompt", "generated"]


class Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One change of the residual stream x after a layer, d the feature's decoder vector.

    All keep the SAE's error term, so what the SAE does not explain is left as it was
    (Templeton et al. 2024, Scaling Monosemanticity). f is the feature's activation on x.

        add        x + value d
        clamp      x + (value - f) d
        scale      x + (value - 1) f d
        ablate     x - f d / min(1, g), g = w_enc · d: the encoder reads 0 of it afterwards
        direction  x + value v, v a vector from a file that the operator named

    Several edits of a layer are of the same x: their order does not matter.

    Attributes:
        op: Which of them.
        feature: Of the layer's SAE.
        direction: Its name in the operator's file; with op direction.
        layer: Zero-indexed decoder layer; may be left out where one SAE alone is served.
        value: Strength; not with ablate.
        unit: `raw`, the residual's own units, or `max`: times the feature's calibrated maximum.
            A scale is a ratio and has none.
        positions: Of which tokens.
    """

    op: Op
    feature: int | None = None
    direction: str | None = None
    layer: int | None = None
    value: float | None = None
    unit: Unit = "raw"
    positions: Positions = "all"


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A feature fired stronger than `above` on one of the `last` tokens.

    Attributes:
        feature, layer, unit: As in `Edit`.
        above: Activation; strictly more meets the condition.
        last: Tokens after the one that met it for which it stays met.
        positions: Tokens that are looked at.
    """

    feature: int
    above: float
    layer: int | None = None
    unit: Unit = "raw"
    last: int = 1
    positions: Positions = "generated"


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """While the condition is met: steer; when it is met: end the answer, or tag it.

    Edits of a rule act on generated tokens: from the token that met the condition where their layer
    is a later one, else from the next.
    """

    when: Condition
    steer: list[Edit] = []
    stop: bool = False
    tag: str | None = None
    name: str | None = None


class SteeringSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Edits and rules of one request."""

    steer: list[Edit] = []
    preset: str | list[str] = []
    rules: list[Rule] = []
