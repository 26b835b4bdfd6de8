"""What rules would have done on a recorded trace. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from neuroscope_vllm.core.steering.settled import NO_RULE, Slot, Steering

TOKENS = ("prompt", "token")


class Hit(msgspec.Struct, frozen=True):
    """A token that meets a condition."""

    position: int
    token: str
    activation: float


class DryRun(msgspec.Struct, frozen=True, kw_only=True):
    """What one rule would have done to one choice.

    Attributes:
        rule: Its name.
        request_id, choice: Whose trace it is.
        tokens: Tokens that the rule looks at.
        unknown: Those of which the trace does not say how active the feature was: it holds the top
            features of each token only, and some were active beside them.
        hits: Tokens that meet the condition. In reality none follows one that steers or stops.
        steered: Positions at which its edits would be in force.
        stops_at: Position of the token that ends the answer, of those that are known.
        surely: Whether none before the first hit is unknown.
    """

    rule: str
    request_id: str
    choice: int
    tokens: int
    unknown: int
    hits: list[Hit]
    steered: list[int]
    stops_at: int | None
    surely: bool


def dry_run(steering: Steering, choices: Iterable[dict[str, Any]]) -> list[DryRun]:
    """Rules against choices as GET /v1/requests/{id} gives them, each rule by itself.

    A trace can not tell what the model would have written had a rule steered it, so every rule is
    held against what it did write.
    """
    conditions = [slot for slot in steering.slots if slot.meets != NO_RULE]
    return [_one(steering, condition, choice) for choice in choices for condition in conditions]


def _one(steering: Steering, condition: Slot, choice: dict[str, Any]) -> DryRun:
    rule = steering.rules[condition.meets]
    events = [
        event
        for event in choice["events"]
        if event["event"] in TOKENS and event.get("layer") == condition.layer
    ]
    looked_at = [event for event in events if _looks(condition, event)]
    hits, unknown, surely = [], 0, True
    for event in looked_at:
        activation = _activation(event, condition.feature)
        if activation is None:
            unknown += 1
            surely = surely and bool(hits)
        elif activation > condition.above:
            hits.append(Hit(event["position"], event["token"], activation))
    edits = [slot for slot in steering.slots if slot.gate == condition.meets]
    generated = [event["position"] for event in events if event["event"] == "token"]
    return DryRun(
        rule=rule.name,
        request_id=choice["request_id"],
        choice=choice["choice"],
        tokens=len(looked_at),
        unknown=unknown,
        hits=hits,
        steered=_in_force(hits, rule.last, condition.layer, edits, generated),
        stops_at=hits[0].position if hits and rule.stop else None,
        surely=surely,
    )


def _looks(condition: Slot, event: dict[str, Any]) -> bool:
    prompt = event["event"] == "prompt"
    return condition.positions == "all" or prompt == (condition.positions == "prompt")


def _activation(event: dict[str, Any], feature: int | None) -> float | None:
    """None: the trace does not say."""
    for steered in event.get("steered", []):
        if steered["index"] == feature:
            return steered["before"]
    top = event["top_features"]
    for one in top:
        if one["index"] == feature:
            return one["activation"]
    return 0.0 if event["l0"] is not None and len(top) >= event["l0"] else None


def _in_force(
    hits: Sequence[Hit], last: int, layer: int, edits: Sequence[Slot], generated: Sequence[int]
) -> list[int]:
    if not edits:
        return []
    first = 0 if any(edit.layer > layer for edit in edits) else 1
    at = {
        position
        for hit in hits
        for position in range(hit.position + first, hit.position + last + 1)
    }
    return sorted(at.intersection(generated))
