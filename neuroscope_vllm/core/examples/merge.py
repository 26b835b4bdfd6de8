"""What is kept of all chunks so far: the driver's half of `collect`, for one layer.

Chunks may be added in any order, with the same result (of `PairCounts`, up to its limit).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from neuroscope_vllm.core.examples.choice import PLACE_BITS, Choice, Table, choose, order
from neuroscope_vllm.core.examples.gather import Gathered
from neuroscope_vllm.core.examples.pairs import PairCounts
from neuroscope_vllm.core.passes import Floors

MAX_CONTEXTS = 4096
_LARGEST = np.uint64(0xFFFFFFFFFFFFFFFF)


class Best:
    """The tokens to keep of each of some features, among all that were added.

    Attributes:
        activation_floor: float32 [width], the weakest of the strongest; 0: there is room.
        ident_floor: uint64 [width], the last of the sample; the largest number: there is room.
    """

    def __init__(self, width: int, top: int, sample: int) -> None:
        self._bits, self._top, self._sample = width.bit_length(), top, sample
        self.activation_floor = np.zeros(width, np.float32)
        self.ident_floor = np.full(width, _LARGEST if sample else 0, np.uint64)
        self._kept = Table.empty()
        self._waiting: list[Table] = []

    def add(self, table: Table) -> None:
        if len(table.ident):
            self._waiting.append(table)
        # What is there is sorted again only once enough has come.
        if 2 * sum(len(some.ident) for some in self._waiting) > len(self._kept.ident):
            self._settle()

    def kept(self) -> tuple[Table, Choice]:
        """All that is kept, and what of it is what."""
        choice = self._settle()
        return self._kept, choice

    def _settle(self) -> Choice:
        table = Table.joined([self._kept, *self._waiting])
        self._waiting = []
        found = order(table.ident, table.place)
        choice = self._choose(table.ident[found], table.place[found], table.activation[found])
        self._kept = table.take(found[choice.either])
        choice = self._places_in(choice)
        self._raise_floors(choice)
        return choice

    def _choose(
        self, ident: NDArray[np.uint64], place: NDArray[np.int64], activation: NDArray[np.float32]
    ) -> Choice:
        return choose(
            ident, place, activation, self._bits, self._top, self._sample, self.activation_floor
        )

    @staticmethod
    def _places_in(choice: Choice) -> Choice:
        """The same choice, as indices into what is kept."""
        either = choice.either
        return Choice(*(np.searchsorted(either, chosen) for chosen in choice))

    def _raise_floors(self, choice: Choice) -> None:
        for chosen, limit, column, floor in (
            (choice.top, self._top, self._kept.activation, self.activation_floor),
            (choice.sample, self._sample, self._kept.ident, self.ident_floor),
        ):
            feature = self.feature(self._kept.ident[chosen])
            bounds = np.searchsorted(feature, np.arange(len(floor) + 1))
            full = np.flatnonzero(np.diff(bounds) == max(limit, 1))
            floor[full] = column[chosen[bounds[full + 1] - 1]]

    def feature(self, ident: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (ident >> np.uint64(64 - self._bits)).astype(np.int64)


class Merged:
    """
    Attributes:
        sae_digest: Of the SAE's weights.
        width: Features of the SAE.
        tokens: Those that features could fire on.
        firings: int64 [width], tokens that each fired on.
        maximum: float32 [width], its largest activation, or 0.
        examples, contexts, pairs: As in `Gathered`, of which the best are kept; sequences are
            numbered through the corpus.
    """

    def __init__(self, first: Gathered, top: int, sample: int) -> None:
        """Of the SAE that `first` is of, which is still to be added."""
        self.sae_digest, self.width = first.sae_digest, len(first.firings)
        self.tokens = 0
        self.firings = np.zeros(self.width, np.int64)
        self.maximum = np.zeros(self.width, np.float32)
        self.examples = Best(self.width, top, sample)
        self.contexts = Best(1, 0, MAX_CONTEXTS)
        self.pairs = PairCounts()

    def add(self, part: Gathered, first_sequence: int) -> None:
        """Add a chunk whose first sequence is that one of the corpus."""
        self.tokens += part.tokens
        self.firings += part.firings
        np.maximum(self.maximum, part.maximum, out=self.maximum)
        for kept, table in ((self.examples, part.examples), (self.contexts, part.contexts)):
            kept.add(table._replace(place=table.place + (first_sequence << PLACE_BITS)))
        self.pairs.add(part.pairs)

    def floors(self) -> Floors:
        return Floors(
            activation=self.examples.activation_floor.tobytes(),
            ident=self.examples.ident_floor.tobytes(),
            context=int(self.contexts.ident_floor[0]),
        )
