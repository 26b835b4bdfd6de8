"""What `neuroscope steer` found: the form of its JSON, and how it is read from answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from neuroscope_vllm.cli.steer_server import Answered, Ask
from neuroscope_vllm.core.steering.effect import Activity, changed, distinct, parting, perplexity

Phase = Literal["prompt", "generated"]
Key = tuple[int, int]
"""Layer, feature."""


class Moved(msgspec.Struct, frozen=True):
    """A feature's activity on tokens where it is edited, before the edit and after; both the same
    where nothing is edited. None: there are no such tokens."""

    before: Activity | None
    after: Activity | None


class FeatureEffect(msgspec.Struct, frozen=True, kw_only=True):
    """An edited feature. Special tokens and attention sinks are left out of its activity."""

    layer: int
    index: int
    label: str | None
    unreliable: bool
    prompt: Moved
    generated: Moved


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One answer.

    Attributes:
        perplexity: Of its tokens under the unsteered model; None of no tokens, or past what a
            double holds.
        distinct_2: Distinct pairs of tokens over all pairs; low where a text repeats itself.
        parts_at: Index of the first token that differs from the unsteered answer; None: none does.
        changed: Share of tokens to put in, take out or replace to get the unsteered answer.
        edits, doses, warnings: What the server made of the steering: values in the residual's own
            units, and the largest change of each layer over its usual residual norm.
    """

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str | None
    perplexity: float | None
    distinct_2: float | None
    parts_at: int | None
    changed: float
    features: list[FeatureEffect]
    edits: list[dict[str, Any]]
    doses: dict[str, float]
    warnings: list[str]


class Strength(msgspec.Struct, frozen=True):
    """A value of a sweep: its answer, or why the server refused it."""

    value: float
    result: Result | None
    refused: str | None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """`steer` and `preset` as they were sent; in a sweep, without its value."""

    model: str
    ask: Ask
    steer: list[dict[str, Any]]
    preset: list[str]


class SideBySide(msgspec.Struct, frozen=True):
    asked: Asked
    unsteered: Result
    steered: Result


class Sweep(msgspec.Struct, frozen=True):
    asked: Asked
    unsteered: Result
    strengths: list[Strength]


class Activations(msgspec.Struct, frozen=True):
    """Of edited or watched features, by phase, on each token: before and after."""

    found: dict[Key, dict[Phase, list[tuple[float, float]]]]

    def moved(self, key: Key, phase: Phase) -> Moved:
        pairs = self.found.get(key, {}).get(phase, [])
        return Moved(Activity.of([b for b, _ in pairs]), Activity.of([a for _, a in pairs]))


def edited(answered: Answered, special: frozenset[int]) -> Activations:
    """Of the features that the request edits, where it does."""
    found: dict[Key, dict[Phase, list[tuple[float, float]]]] = {}
    for event in _tokens(answered, special):
        # Several edits of a feature tell of the same before and after.
        for one in {one["index"]: one for one in event.get("steered", ())}.values():
            phases = found.setdefault((event["layer"], one["index"]), defaultdict(list))
            phases[_phase(event)].append((one["before"], one["after"]))
    return Activations(found)


def watched(answered: Answered, special: frozenset[int]) -> Activations:
    """Of the features that its rules look at, on every token; it is not edited."""
    rules = _steering(answered).get("rules", [])
    keys = {(rule["layer"], rule["feature"]) for rule in rules}
    hits = {
        (event["layer"], event["feature"], event["position"]): event["activation"]
        for event in answered.events
        if event["event"] == "rule"
    }
    found: dict[Key, dict[Phase, list[tuple[float, float]]]] = {}
    for event in _tokens(answered, special):
        for layer, index in keys:
            if layer == event["layer"]:
                value = hits.get((layer, index, event["position"]), 0.0)
                phases = found.setdefault((layer, index), defaultdict(list))
                phases[_phase(event)].append((value, value))
    return Activations(found)


def result(
    answered: Answered,
    unsteered: Answered,
    logprobs: list[float],
    activations: Activations,
    keys: Iterable[Key],
    labels: dict[Key, dict[str, Any] | None],
) -> Result:
    steering = _steering(answered)
    warnings = list(steering.get("warnings", []))
    if answered.events_lost:
        warnings.append(
            f"{answered.events_lost} events of it are no longer kept, so activations are of the"
            " rest; serve with a larger memory_mb."
        )
    return Result(
        request_id=answered.request_id,
        text=answered.text,
        token_ids=answered.token_ids,
        finish_reason=answered.finish_reason,
        perplexity=perplexity(logprobs),
        distinct_2=distinct(answered.token_ids),
        parts_at=parting(answered.token_ids, unsteered.token_ids),
        changed=changed(answered.token_ids, unsteered.token_ids),
        features=[_effect(key, activations, labels[key]) for key in keys],
        edits=steering.get("edits", []),
        doses=steering.get("doses", {}),
        warnings=warnings,
    )


def edited_keys(answered: Answered) -> list[Key]:
    """Features that the server says it edits, in their order."""
    edits = _steering(answered).get("edits", [])
    return list(dict.fromkeys((e["layer"], e["feature"]) for e in edits if "feature" in e))


def is_steered(answered: Answered) -> bool:
    """Whether the server took notice at all."""
    return bool(_steering(answered))


def _effect(key: Key, activations: Activations, label: dict[str, Any] | None) -> FeatureEffect:
    return FeatureEffect(
        layer=key[0],
        index=key[1],
        label=label["text"] if label else None,
        unreliable=bool(label and label["unreliable"]),
        prompt=activations.moved(key, "prompt"),
        generated=activations.moved(key, "generated"),
    )


def _steering(answered: Answered) -> dict[str, Any]:
    heads = (event for event in answered.events if event["event"] == "request")
    return next(heads, {}).get("steering") or {}


def _tokens(answered: Answered, special: frozenset[int]) -> Iterable[dict[str, Any]]:
    """Events of tokens whose features count."""
    for event in answered.events:
        is_token = event["event"] in ("prompt", "token") and event["features_at"] == "self"
        if is_token and not event.get("sink") and event["token_id"] not in special:
            yield event


def _phase(event: dict[str, Any]) -> Phase:
    return "prompt" if event["event"] == "prompt" else "generated"
