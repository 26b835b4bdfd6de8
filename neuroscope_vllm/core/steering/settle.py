"""From what was asked to what is applied, or a refusal that names the field."""

from __future__ import annotations

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable

import msgspec
import numpy as np

from neuroscope_vllm.core.steering.arithmetic import ablating
from neuroscope_vllm.core.steering.catalogue import Catalogue, Site
from neuroscope_vllm.core.steering.settled import (
    MAX_RULES,
    MAX_SLOTS,
    NO_RULE,
    SettledRule,
    Slot,
    Steering,
)
from neuroscope_vllm.core.steering.spec import Condition, Edit, Rule, SteeringSpec

MAX_VALUE = 1e6
"""Beyond, float16 overflows whatever the vector."""
MAX_NAME = 64


class SteeringRefused(ValueError):
    """One sentence: the field, why not, and what to do instead."""


def settle(asked: SteeringSpec, catalogue: Catalogue) -> Steering | None:
    """What a request's edits and rules, its presets and the operator's rules come to.

    None: nothing at all.

    Raises:
        SteeringRefused: Something asked for can not be done.
    """
    return _Settling(catalogue).all_of(asked)


class _Settling:
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._slots: list[Slot] = []
        self._rules: list[SettledRule] = []
        self._dose: defaultdict[tuple[int, str], float] = defaultdict(float)
        """By layer and phase, prompt or generated: edits of one meet no edits of the other."""

    def all_of(self, asked: SteeringSpec) -> Steering | None:
        room = MAX_SLOTS * len(self._catalogue.sites)
        for field, given in (("steer", asked.steer), ("preset", asked.preset)):
            if not isinstance(given, str) and len(given) > room:
                raise SteeringRefused(
                    f"{field}: {len(given)} are more than {room}, for which there is room."
                )
        for i, edit in enumerate(asked.steer):
            self._edit(edit, f"steer[{i}]")
        for name in [asked.preset] if isinstance(asked.preset, str) else asked.preset:
            for i, edit in enumerate(self._preset(name)):
                self._edit(edit, f"preset {name}[{i}]")
        for i, rule in enumerate(asked.rules):
            self._rule(rule, f"rules[{i}]")
        for i, rule in enumerate(self._catalogue.operator.rules):
            self._rule(rule, f"the operator's rules[{i}]")
        if not self._slots:
            return None
        self._check_room()
        store = self._catalogue.kv_store
        if store is not None and any(slot.writes for slot in self._slots):
            raise SteeringRefused(
                f"steer: this server shares keys and values through {store}, which finds them by"
                " their tokens alone, so steered ones would reach others; serve without"
                " --kv-transfer-config to steer."
            )
        return Steering(
            slots=self._slots,
            rules=self._rules,
            doses={layer: round(dose, 3) for layer, dose in self._doses().items()},
            warnings=self._warnings(),
        )

    def _edit(self, edit: Edit, where: str, gate: int = NO_RULE) -> None:
        positions = edit.positions if gate == NO_RULE else "generated"
        if edit.op == "direction":
            slot, norm = self._direction(edit, where)
        else:
            slot, norm = self._feature_edit(edit, where)
        layer_norm = self._catalogue.sites[slot.layer].median_norm
        if norm is not None and layer_norm is not None:
            for phase in ("prompt", "generated") if positions == "all" else (positions,):
                self._dose[slot.layer, phase] += norm / layer_norm
        self._slots.append(msgspec.structs.replace(slot, positions=positions, gate=gate))

    def _direction(self, edit: Edit, where: str) -> tuple[Slot, float]:
        known = self._catalogue.operator.directions
        if edit.feature is not None:
            raise SteeringRefused(
                f"{where}.feature: op direction adds no feature; use op add, or leave it out."
            )
        if edit.direction not in known:
            raise SteeringRefused(
                f"{where}.direction: {_unknown(edit.direction, known, 'direction')}"
            )
        layer = known[edit.direction].layer
        if edit.layer not in (None, layer):
            raise SteeringRefused(f"{where}.layer: direction {edit.direction} is of layer {layer}.")
        if edit.unit != "raw":
            raise SteeringRefused(f"{where}.unit: a direction has no calibrated maximum; use raw.")
        value = _value(edit.value, where)
        slot = Slot(layer=layer, direction=edit.direction, op=edit.op, constant=value)
        return slot, abs(value) * self._catalogue.norms[edit.direction]

    def _feature_edit(self, edit: Edit, where: str) -> tuple[Slot, float | None]:
        """The slot, and the largest norm of its change, if it is known."""
        if edit.direction is not None:
            raise SteeringRefused(
                f"{where}.direction: only op direction takes one; this is {edit.op}."
            )
        layer, site = self._site(edit.layer, where)
        feature = _feature(edit.feature, site, where)
        if edit.op != "add":
            _check_gates(site, f"{where}.op", edit.op)
        strongest = float(site.maximum[feature]) if site.maximum is not None else None
        norm = float(site.norm[feature])
        per_activation, constant = 0.0, 0.0
        if edit.op == "ablate":
            if edit.value is not None:
                raise SteeringRefused(
                    f"{where}.value: ablate takes none; use clamp to set a value."
                )
            if edit.unit != "raw":
                raise SteeringRefused(f"{where}.unit: ablate has no value; leave it out.")
            times = _ablating(float(site.gain[feature]), feature, where)
            per_activation = -times
            # The first time takes away what was there.
            largest = None if strongest is None else (times - 1) * strongest
            if times == 1:
                largest = 0.0
        elif edit.op == "scale":
            if edit.unit != "raw":
                raise SteeringRefused(f"{where}.unit: scale is a ratio; leave it out.")
            per_activation = _value(edit.value, where) - 1.0
            largest = None if strongest is None else abs(per_activation) * strongest
            if per_activation <= 0 and edit.value is not None and edit.value >= 0:
                largest = 0.0
        else:
            constant = _in_unit(_value(edit.value, where), edit.unit, site, feature, where)
            per_activation = -1.0 if edit.op == "clamp" else 0.0
            largest = abs(constant)
            if edit.op == "clamp" and strongest is not None:  # from 0, or from its maximum
                largest = max(largest, abs(constant - strongest))
        slot = Slot(
            layer=layer,
            feature=feature,
            op=edit.op,
            per_activation=per_activation,
            constant=constant,
        )
        return slot, None if largest is None else largest * norm

    def _rule(self, rule: Rule, where: str) -> None:
        if not (rule.steer or rule.stop or rule.tag):
            raise SteeringRefused(f"{where}: it does nothing; give it steer, stop or tag.")
        for field, text in (("tag", rule.tag), ("name", rule.name)):
            if text is not None and not 0 < len(text) <= MAX_NAME:
                raise SteeringRefused(f"{where}.{field}: give 1 to {MAX_NAME} characters.")
        number = len(self._rules)
        if number == MAX_RULES:
            raise SteeringRefused(
                f"rules: a request may have {MAX_RULES}, the operator's among them."
            )
        self._slots.append(self._condition(rule.when, number, f"{where}.when"))
        name = rule.name or f"{self._slots[-1].layer}:{self._slots[-1].feature}"
        self._rules.append(
            SettledRule(name=name, last=rule.when.last, stop=rule.stop, tag=rule.tag)
        )
        for i, edit in enumerate(rule.steer):
            if edit.positions == "prompt":
                raise SteeringRefused(
                    f"{where}.steer[{i}].positions: rules steer generated tokens only."
                )
            self._edit(edit, f"{where}.steer[{i}]", gate=number)
        if self._catalogue.staged:
            self._check_stages(rule, where, number)
        if self._catalogue.drafts and (rule.steer or rule.stop):
            raise SteeringRefused(
                f"{where}: under speculative decoding a draft that is rejected may meet the"
                " condition, so a rule can only tag; serve without it to steer or stop."
            )

    def _check_stages(self, rule: Rule, where: str, number: int) -> None:
        layers = {slot.layer for slot in self._slots if number in (slot.gate, slot.meets)}
        if rule.stop or len(layers) > 1:
            raise SteeringRefused(
                f"{where}: under pipeline parallelism a rule can not stop, nor steer another layer"
                " than that of its condition; leave that out, or serve with tensor parallelism."
            )

    def _condition(self, when: Condition, number: int, where: str) -> Slot:
        layer, site = self._site(when.layer, where)
        feature = _feature(when.feature, site, where)
        _check_gates(site, f"{where}.feature", "a condition")
        if not 1 <= when.last <= 1 << 20:
            raise SteeringRefused(
                f"{where}.last: {when.last} is no number of tokens; give 1 or more."
            )
        above = _in_unit(_value(when.above, where, "above"), when.unit, site, feature, where)
        if above < 0:
            raise SteeringRefused(
                f"{where}.above: every token meets {when.above:g}, as no activation is below 0;"
                " give 0 or more."
            )
        return Slot(
            layer=layer, feature=feature, positions=when.positions, meets=number, above=above
        )

    def _preset(self, name: str) -> list[Edit]:
        known = self._catalogue.operator.presets
        if name not in known:
            raise SteeringRefused(f"preset: {_unknown(name, known, 'preset')}")
        return known[name]

    def _site(self, layer: int | None, where: str) -> tuple[int, Site]:
        sites = self._catalogue.sites
        if layer is None:
            if len(sites) > 1:
                raise SteeringRefused(f"{where}.layer: say which of {_layers(sites)}.")
            layer = next(iter(sites))
        if layer not in sites:
            raise SteeringRefused(
                f"{where}.layer: no SAE of layer {layer} is served; there is {_layers(sites)}."
            )
        return layer, sites[layer]

    def _check_room(self) -> None:
        layer, count = Counter(slot.layer for slot in self._slots).most_common(1)[0]
        if count > MAX_SLOTS:
            raise SteeringRefused(
                f"steer: {count} edits and conditions on layer {layer}; a request may have"
                f" {MAX_SLOTS} on a layer, presets and the operator's rules among them."
            )

    def _doses(self) -> dict[int, float]:
        layers = sorted({layer for layer, _ in self._dose})
        return {
            layer: max(dose for (of, _), dose in self._dose.items() if of == layer)
            for layer in layers
        }

    def _warnings(self) -> list[str]:
        operator, found = self._catalogue.operator, []
        for layer, dose in self._doses().items():
            size = (
                f"steering changes layer {layer} by up to {dose:.1f} of the usual residual's norm"
            )
            if dose > operator.max_dose:
                raise SteeringRefused(
                    f"steer: {size}, and the limit is {operator.max_dose:g}; give smaller values."
                )
            if dose > operator.warn_dose:
                found.append(f"{size}; past {operator.warn_dose:g} text often falls apart.")
        edited = {slot.layer for slot in self._slots if slot.writes}
        return found + [
            f"how large the change of layer {layer} is, is not known: its SAE has no calibration."
            for layer in sorted(edited - self._doses().keys())
        ]


def _feature(feature: int | None, site: Site, where: str) -> int:
    if feature is None:
        raise SteeringRefused(f"{where}.feature: name one, 0 to {len(site.norm) - 1}.")
    if not 0 <= feature < len(site.norm):
        raise SteeringRefused(
            f"{where}.feature: {feature} does not exist; SAE {site.source} has features 0 to"
            f" {len(site.norm) - 1}."
        )
    return feature


def _value(value: float | None, where: str, field: str = "value") -> float:
    if value is None:
        raise SteeringRefused(f"{where}.{field}: give a number.")
    if not math.isfinite(value) or abs(value) > MAX_VALUE:
        raise SteeringRefused(
            f"{where}.{field}: {value:g} is out of range; give at most {MAX_VALUE:g}."
        )
    return float(value)


def _ablating(gain: float, feature: int, where: str) -> float:
    if gain <= 0:
        raise SteeringRefused(
            f"{where}.op: the encoder of feature {feature} does not read its own decoder vector"
            f" (w_enc · d = {gain:.2g}), so nothing along it makes the activation 0; use clamp with"
            " value 0 to take out its part in the SAE's reconstruction."
        )
    return ablating(gain)


def _in_unit(value: float, unit: str, site: Site, feature: int, where: str) -> float:
    if unit == "raw":
        return value
    if site.maximum is None:
        raise SteeringRefused(
            f"{where}.unit: SAE {site.source} has no calibration, so no maximum is known; use raw,"
            " or make one with `neuroscope calibrate`."
        )
    strongest = float(site.maximum[feature])
    if strongest <= 0:
        raise SteeringRefused(
            f"{where}.unit: feature {feature} never fired while it was calibrated; use raw."
        )
    return float(np.clip(value * strongest, -MAX_VALUE, MAX_VALUE))


def _check_gates(site: Site, where: str, what: str) -> None:
    if not site.gates:
        raise SteeringRefused(
            f"{where}: SAE {site.source} keeps the k largest features of a token, so one feature's"
            f" activation depends on all others and {what} can not be done exactly; use op add."
        )


def _layers(sites: Iterable[int]) -> str:
    return f"layer {', '.join(map(str, sorted(sites)))}"


def _unknown(name: str | None, known: Iterable[str], what: str) -> str:
    names = sorted(known)
    if name is None:
        return f"name a {what}; there is {', '.join(names[:8]) or 'none'}."
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(names[:8]) or 'none'}."
    return f"no {what} is named {name[:MAX_NAME]}; {hint}"
