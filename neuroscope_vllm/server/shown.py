"""The label that a feature is shown with: of a layer's sets, the first that knows it names it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from neuroscope_vllm.core.labels import LabelSet

NONE: Mapping[int, str] = MappingProxyType({})


class Shown:
    """Looked up for every feature of every token."""

    def __init__(self, labels: dict[int, list[LabelSet]]) -> None:
        """`labels`: label sets by layer, in order of preference."""
        shown = {
            layer: {label.index: label for one in reversed(sets) for label in one}
            for layer, sets in labels.items()
        }
        self._texts = {
            layer: {index: label.text for index, label in of.items()} for layer, of in shown.items()
        }
        self._unreliable = {
            layer: frozenset(index for index, label in of.items() if label.unreliable)
            for layer, of in shown.items()
        }

    def labels(self, layer: int) -> Mapping[int, str]:
        """The label of each feature of a layer that has one."""
        return self._texts.get(layer, NONE)

    def unreliable(self, layer: int) -> frozenset[int]:
        """Features of a layer whose label, as `labels` has it, is unreliable."""
        return self._unreliable.get(layer, frozenset())
