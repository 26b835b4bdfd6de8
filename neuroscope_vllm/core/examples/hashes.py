"""64-bit hashes that decide, the same everywhere, which tokens are kept and which are held out."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_SPREAD = np.uint64(0x9E3779B97F4A7C15)


def mixed(x: U64) -> U64:
    """Each number scattered over 64 bits, one to one (splitmix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def context_hashes(token_id: NDArray[np.integer], start: NDArray[np.integer], before: int) -> U64:
    """Of each token with up to `before` tokens in front of it.

    Args:
        token_id: [n], of sequences one after another.
        start: [n], where each token's own sequence begins.
    """
    word = mixed(token_id.astype(np.uint64) + _SPREAD)
    index = np.arange(len(word))
    found = np.zeros_like(word)
    for back in range(before, -1, -1):
        at = index - back
        found = np.where(at >= start, found * _SPREAD + word[np.maximum(at, 0)], found)
    return mixed(found)


def idents(feature: NDArray[np.integer], context: U64, bits: int) -> U64:
    """Feature and context in one number, that sorts by feature, then at random.

    Args:
        feature: [n], below 2**bits.
        context: [n], of `context_hashes`.
    """
    salted = mixed(context ^ (feature.astype(np.uint64) * _SPREAD))
    shift = np.uint64(64 - bits)
    return (feature.astype(np.uint64) << shift) | (salted >> np.uint64(bits))


def held_out(sequence: NDArray[np.integer]) -> bool:
    """Whether a sequence is kept from labellers: about half are, by their tokens alone."""
    return bool(hashlib.blake2b(sequence.astype("<i4").tobytes(), digest_size=8).digest()[0] & 1)
