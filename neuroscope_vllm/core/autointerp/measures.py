"""What a judge's answers are worth. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """How well answers tell one class from the other.

    As in eai-delphi: a rate of nothing is 0, and texts without an answer do not count.

    Attributes:
        balanced: Mean of the two classes' own accuracies: 0.5 says nothing was told apart, whatever
            the number of texts in each.
        f1, precision, recall: Of "fires".
        true_positives, false_negatives: Of the texts in which the feature fires.
        true_negatives, false_positives: Of the others.
    """

    balanced: float
    f1: float
    precision: float
    recall: float
    true_positives: int
    false_negatives: int
    true_negatives: int
    false_positives: int


def accuracy(judged: Iterable[tuple[int, int]]) -> Accuracy:
    """Of pairs of what is true and what was answered, 1 or 0 each."""
    pairs = [(bool(truth), bool(answer)) for truth, answer in judged]
    tp, fn = pairs.count((True, True)), pairs.count((True, False))
    tn, fp = pairs.count((False, False)), pairs.count((False, True))
    recall, precision = _rate(tp, tp + fn), _rate(tp, tp + fp)
    return Accuracy(
        balanced=(recall + _rate(tn, tn + fp)) / 2,
        f1=_rate(2 * precision * recall, precision + recall),
        precision=precision,
        recall=recall,
        true_positives=tp,
        false_negatives=fn,
        true_negatives=tn,
        false_positives=fp,
    )


def _rate(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
