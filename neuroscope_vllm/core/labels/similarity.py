"""How alike short texts are in their wording. Torch-free."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

NGRAMS = (3, 4, 5)


class TextVectors:
    """TF-IDF vectors over the words of some texts and the runs of 3 to 5 characters in them.

    Runs reach over the edges of words, not into the next, so `cities` is like `city` and `old man`
    like `man, old`. What they mean is not known: `dogs` is as unlike `puppies` as `bridges`.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        numbers: dict[str, int] = {}
        rows = [Counter(numbers.setdefault(t, len(numbers)) for t in _terms(x)) for x in texts]
        self._start = np.cumsum([0, *map(len, rows)])
        self._term = np.array([term for row in rows for term in row], dtype=np.int64)
        count = np.array([n for row in rows for n in row.values()], dtype=np.float64)
        self._terms = max(len(numbers), 1)
        seen = np.bincount(self._term, minlength=self._terms)
        weight = count * (np.log((1 + len(texts)) / (1 + seen)) + 1)[self._term]
        row = np.repeat(np.arange(len(texts)), np.diff(self._start))
        norm = np.sqrt(np.bincount(row, weight**2, minlength=len(texts)))
        self._weight = weight / np.maximum(norm, 1e-300)[row]

    def cosine(self, ones: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of each pair of texts, by number: 0 without a common run, 1 for the same words."""
        (keys, values), (other_keys, other_values) = self._entries(ones), self._entries(others)
        _, at, other_at = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
        products = values[at] * other_values[other_at]
        found = np.bincount(keys[at] // self._terms, products, minlength=len(ones))
        return np.minimum(found, 1.0)

    def _entries(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Terms and weights of some texts, one after another; terms numbered anew for each."""
        lengths = self._start[rows + 1] - self._start[rows]
        first = np.cumsum(lengths) - lengths
        at = np.arange(lengths.sum()) + np.repeat(self._start[rows] - first, lengths)
        pair = np.repeat(np.arange(len(rows)), lengths)
        return pair * self._terms + self._term[at], self._weight[at]


def _terms(text: str) -> Iterator[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    # A text without a word, as of a feature of commas, is its signs.
    for word in re.findall(r"\w+", folded) or re.findall(r"\S", folded):
        yield word
        padded = f" {word} "
        for n in NGRAMS:
            for start in range(len(padded) - n + 1):
                yield padded[start : start + n]


def spearman(ones: NDArray[np.float64], others: NDArray[np.float64]) -> float | None:
    """Rank correlation, ties by their mean rank; None where there is none to be had."""
    if len(ones) < 3:
        return None
    first, second = _ranks(ones), _ranks(others)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, at, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[at]
