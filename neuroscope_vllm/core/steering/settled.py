"""Steering as a worker applies it: numbers only, layers known. Torch-free."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from neuroscope_vllm.core.steering.spec import Op, Positions

MAX_SLOTS = 8
"""Edits and conditions of a request on one layer."""
MAX_RULES = 4
NO_RULE = -1


class Slot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One vector at one layer, that is written, read, or both:

        x += (per_activation f + constant) d

    Attributes:
        layer: Zero-indexed decoder layer.
        feature: Whose f and d; None: `direction` names d, and f is 0.
        direction: Name in the operator's file.
        op: As it was asked; None where f is only read.
        per_activation, constant: What is done; both 0 where a rule's condition only reads f.
        positions: Of which tokens.
        gate: Number of the rule that must be met; NO_RULE: always.
        meets: Number of the rule that an f above `above` meets; NO_RULE: none.
        above: In the residual's own units.
    """

    layer: int
    feature: int | None = None
    direction: str | None = None
    op: Op | None = None
    per_activation: float = 0.0
    constant: float = 0.0
    positions: Positions = "all"
    gate: int = NO_RULE
    meets: int = NO_RULE
    above: float = 0.0

    @property
    def writes(self) -> bool:
        return bool(self.per_activation or self.constant)


class SettledRule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a rule does beside the edits that it gates; `last` counts tokens."""

    name: str
    last: int
    stop: bool = False
    tag: str | None = None


class Steering(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All of one request.

    Attributes:
        slots: Edits and conditions.
        rules: Those that `Slot.gate` and `Slot.meets` number.
        doses: Largest change of each edited layer over the median residual norm there; layers
            without a calibration are left out.
        warnings: Sentences for who reads the stream.
    """

    slots: list[Slot]
    rules: list[SettledRule] = []
    doses: dict[int, float] = {}
    warnings: list[str] = []

    def of_layer(self, layer: int) -> list[Slot]:
        return [slot for slot in self.slots if slot.layer == layer]

    @property
    def edits_prompt(self) -> bool:
        """Whether keys and values of the prompt differ from unsteered ones."""
        return any(slot.writes and slot.positions != "generated" for slot in self.slots)

    @property
    def splits(self) -> bool:
        """Whether prompt and answer are edited differently."""
        return any(slot.writes and slot.positions != "all" for slot in self.slots)

    @property
    def reads_prompt(self) -> bool:
        """Whether a condition looks at prompt tokens, which then have to run."""
        return any(s.meets != NO_RULE and s.positions != "generated" for s in self.slots)

    @property
    def digest(self) -> str:
        """Equal for requests that steer alike, whatever else they ask for."""
        what = msgspec.msgpack.encode((self.slots, [(rule.last, rule.stop) for rule in self.rules]))
        return hashlib.blake2b(what, digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For readers: values in the residual's own units, whatever they were given in."""
        found: dict[str, Any] = {
            "edits": [_edit(s, self.rules) for s in self.slots if s.meets == NO_RULE]
        }
        if self.rules:
            found["rules"] = [
                {
                    "name": rule.name,
                    "layer": slot.layer,
                    "feature": slot.feature,
                    "above": slot.above,
                    "last": rule.last,
                    "stop": rule.stop,
                    "tag": rule.tag,
                }
                for slot in self.slots
                if slot.meets != NO_RULE
                for rule in [self.rules[slot.meets]]
            ]
        doses = {str(layer): dose for layer, dose in self.doses.items()}
        return {**found, "doses": doses, "warnings": self.warnings}

    def to_dict(self) -> dict[str, Any]:
        return msgspec.to_builtins(self, str_keys=True)


def _edit(slot: Slot, rules: list[SettledRule]) -> dict[str, Any]:
    found: dict[str, Any] = {"op": slot.op, "layer": slot.layer}
    if slot.feature is not None:
        found["feature"] = slot.feature
    else:
        found["direction"] = slot.direction
    if slot.op != "ablate":
        found["value"] = 1 + slot.per_activation if slot.op == "scale" else slot.constant
    found["positions"] = slot.positions
    if slot.gate != NO_RULE:
        found["rule"] = rules[slot.gate].name
    return found


def from_dict(given: Any) -> Steering:
    return msgspec.convert(given, Steering, strict=False)
