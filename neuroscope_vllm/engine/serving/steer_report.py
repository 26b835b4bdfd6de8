"""What steering did to the rows of a step, as messages to the hub."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.steering.settled import NO_RULE, SettledRule, Slot


class SpanSteering(NamedTuple):
    """What edits and conditions found in the rows of one request at one layer.

    Attributes:
        span: Number of the request in the step.
        start: Its first row.
        slots: Of the layer, in the order of the columns.
        rules: Of the request.
        found: float32 [rows, 2, at least len(slots)], f before and after the edits, on the
            worker's device.
    """

    span: int
    start: int
    layer: int
    slots: list[Slot]
    rules: list[SettledRule]
    found: torch.Tensor


def steered_rows(part: SpanSteering, found: NDArray[np.float32]) -> list[wire.SteeredRows]:
    """Of the features that are edited. `found`: `part.found` on the host."""
    edited = [column for column, slot in enumerate(part.slots) if slot.meets == NO_RULE]
    if not edited:
        return []
    return [
        wire.SteeredRows(
            span=part.span,
            layer=part.layer,
            features=[_feature(part.slots[column]) for column in edited],
            before=found[:, 0, edited].astype("<f4").tobytes(),
            after=found[:, 1, edited].astype("<f4").tobytes(),
        )
    ]


def rule_hits(part: SpanSteering, found: NDArray[np.float32]) -> list[wire.RuleHit]:
    """Rows that met a condition. `found`: `part.found` on the host."""
    hits = []
    for column, slot in enumerate(part.slots):
        if slot.meets == NO_RULE:
            continue
        rule = part.rules[slot.meets]
        for row in np.flatnonzero(found[:, 0, column] > slot.above).tolist():
            hits.append(
                wire.RuleHit(
                    row=part.start + row,
                    layer=part.layer,
                    feature=_feature(slot),
                    activation=float(found[row, 0, column]),
                    rule=rule.name,
                    tag=rule.tag,
                    stop=rule.stop,
                )
            )
    return hits


def _feature(slot: Slot) -> int:
    assert slot.feature is not None
    return slot.feature
