"""A corpus in which feature i fires on word i, and its examples as `collect` would gather them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from neuroscope_vllm.core.examples import (
    Collection,
    Context,
    Example,
    FeatureSummary,
    write_examples,
)
from neuroscope_vllm.core.examples.store import SCHEMAS

BEFORE, AFTER, LENGTH = 6, 3, 50
WINDOW = BEFORE + 1 + AFTER


def word(feature: int) -> str:
    return f" w{feature}x"


class WordFeatures:
    """Sequences of words; of word i fires feature i, and of a word below `pairs` also i + 1000.

    Attributes:
        sequences: Words of each, as numbers.
        strength: Activation of the word's own feature at each place.
    """

    def __init__(self, words: int = 60, sequences: int = 400, pairs: int = 4) -> None:
        draw = np.random.default_rng(3)
        # Word 0 is everywhere, and the last ones are rare.
        share = np.linspace(3.0, 0.05, words) ** 2
        share[0] = share.sum() / 2
        self.words, self.pairs = words, pairs
        self.sequences = draw.choice(words, (sequences, LENGTH), p=share / share.sum())
        self.strength = draw.exponential(1.0, (sequences, LENGTH)) + 0.1

    def held_out(self, sequence: int) -> bool:
        return bool(zlib.crc32(self.sequences[sequence].tobytes()) & 1)

    def fires(self, feature: int) -> np.ndarray:
        """bool [sequences, LENGTH]. The twin of a word fires on half of its places."""
        if feature < 1000:
            return self.sequences == feature
        return (self.sequences == feature - 1000) & (self.strength > 0.8)

    @property
    def features(self) -> list[int]:
        return [*range(self.words), *range(1000, 1000 + self.pairs)]

    def write(self, folder: Path, sae_digest: str = "d" * 16) -> None:
        collection = Collection(
            sae="/sae", sae_digest=sae_digest, layer=20, model="m", corpus="c",
            created="2026-01-01", width=2000, samples=len(self.sequences),
            tokens=self.sequences.size, before=BEFORE, after=AFTER, top=20, sample=60,
        )  # fmt: skip
        rows: dict[str, list[Any]] = {
            "examples": [e for feature in self.features for e in self.examples(feature)],
            "features": [self.summary(feature) for feature in self.features],
            "contexts": self.contexts(),
        }
        batches = {
            name: [pa.RecordBatch.from_pylist(msgspec.to_builtins(rows[name]), schema=schema)]
            for name, schema in SCHEMAS.items()
        }
        write_examples(folder, collection, batches)

    def examples(self, feature: int) -> list[Example]:
        places = np.argwhere(self.fires(feature))
        strength = self.strength[tuple(places.T)]
        top = np.argsort(-strength, kind="stable")[:20]
        sample = np.random.default_rng(feature).permutation(len(places))[:60]
        chosen = [("top", i) for i in top] + [("sample", i) for i in sample]
        return [self._example(feature, kind, *places[i].tolist()) for kind, i in chosen]

    def _example(self, feature: int, kind: str, sequence: int, position: int) -> Example:
        start, stop = max(position - BEFORE, 0), min(position + AFTER + 1, LENGTH)
        where = slice(start, stop)
        values = np.where(self.fires(feature), self.strength, 0.0)[sequence, where]
        return Example(
            feature=feature,
            kind=kind,
            activation=float(self.strength[sequence, position]),
            sequence=sequence,
            position=position,
            held_out=self.held_out(sequence),
            tokens=[word(w) for w in self.sequences[sequence, where]],
            activations=values.tolist(),
            at=position - start,
        )

    def summary(self, feature: int) -> FeatureSummary:
        fires = self.fires(feature)
        twin = feature - 1000 if feature >= 1000 else feature + 1000
        has = feature >= 1000 or feature < self.pairs
        partners = [twin] if has else []
        return FeatureSummary(
            feature=feature,
            firings=int(fires.sum()),
            max_activation=float(self.strength[fires].max(initial=0.0)),
            partners=partners,
            together=[int((fires & self.fires(p)).sum()) for p in partners],
        )

    def contexts(self) -> list[Context]:
        found = []
        for sequence in range(len(self.sequences)):
            if self.held_out(sequence):
                for start in range(0, LENGTH - WINDOW + 1, WINDOW):
                    where = slice(start, start + WINDOW)
                    firing = [f for f in self.features if self.fires_in(f, sequence, where)]
                    found.append(
                        Context(
                            sequence=sequence,
                            position=start,
                            tokens=[word(w) for w in self.sequences[sequence, where]],
                            features=firing,
                            activations=[1.0] * len(firing),
                        )
                    )
        return found

    def fires_in(self, feature: int, sequence: int, where: slice) -> bool:
        row, strength = self.sequences[sequence, where], self.strength[sequence, where]
        if feature < 1000:
            return bool((row == feature).any())
        return bool(((row == feature - 1000) & (strength > 0.8)).any())
