"""Texts in which a feature is silent, some of them hard to tell from those where it fires.

Hard ones are contexts in which a neighbour of the feature fires and it does not. Neighbours are
the features that most often fire on the same token, for how often both fire at all: what a label
that is too broad takes for this one. The examples know them, while directions that are near in the
decoder need the SAE's weights, and may be of features that never fire on these texts. Torch-free.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from neuroscope_vllm.core.examples import ExampleStore

CHANCE = 2.0
"""Neighbours fire together more often than this times what chance has it."""


class Negatives:
    """The contexts of a collection, by what fires in them."""

    def __init__(self, store: ExampleStore) -> None:
        # As columns: as records, with a thousand features each, they would fill the memory.
        contexts = store.table("contexts", ["sequence", "position", "tokens", "features"])
        features = store.table("features", ["feature", "firings", "partners", "together"])
        self._tokens, self._tokens_read = contexts["tokens"], store.collection.tokens
        self._ids = [
            f"{sequence}:{position}"
            for sequence, position in zip(
                contexts["sequence"].to_pylist(), contexts["position"].to_pylist(), strict=True
            )
        ]
        lists = contexts["features"].combine_chunks()
        fired = lists.flatten().to_numpy(zero_copy_only=False)
        counts = lists.value_lengths().to_numpy(zero_copy_only=False)
        order = np.argsort(fired, kind="stable")
        self._fired = fired[order]
        self._context = np.repeat(np.arange(len(self._ids)), counts)[order]
        self._row = {index: row for row, index in enumerate(features["feature"].to_pylist())}
        self._firings = features["firings"].to_numpy()
        self._partners, self._together = features["partners"], features["together"]

    def text(self, context: int) -> tuple[str, list[str]]:
        """The id and the tokens of a context."""
        return self._ids[context], self._tokens[context].as_py()

    def choose(
        self, feature: int, count: int, draw: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Contexts in all of which the feature is silent: hard ones, at most half, and random ones.

        Hard ones come from the nearest neighbours in turn. Where there are too few, random ones
        take their place.
        """
        firing = self._firing(feature)
        queues = [
            draw.permutation(np.setdiff1d(self._firing(partner), firing)).tolist()
            for partner in self.neighbours(feature)
        ]
        hard: dict[int, None] = {}
        while len(hard) < count // 2 and (queues := [queue for queue in queues if queue]):
            for queue in queues:
                if len(hard) < count // 2:
                    hard[queue.pop()] = None
        taken = np.concatenate([firing, np.array(list(hard), dtype=firing.dtype)])
        silent = np.setdiff1d(np.arange(len(self._ids)), taken)
        return list(hard), draw.permutation(silent)[: count - len(hard)].tolist()

    def neighbours(self, feature: int) -> list[int]:
        """Nearest first: by the cosine of the two features' firings, as zeros and ones.

        Those that fire together with it no more often than chance has it are none.
        """
        if (row := self._row.get(feature)) is None:
            return []
        together = zip(self._partners[row].as_py(), self._together[row].as_py(), strict=True)
        own, near = self._firings[row], {}
        for partner, count in together:
            theirs = self._firings[self._row[partner]]
            if count > CHANCE * own * theirs / self._tokens_read:
                near[partner] = count / theirs**0.5
        return sorted(near, key=lambda partner: (-near[partner], partner))

    def _firing(self, feature: int) -> NDArray[np.int64]:
        """The contexts that it fires in, ascending."""
        start, stop = np.searchsorted(self._fired, [feature, feature + 1])
        return self._context[start:stop]
