"""The texts that a label is scored on: where the feature fires, and where it does not. Torch-free.

Only of sequences that are held out from labellers. In length and in the places of their marks both
classes are alike, so a judge that looks at nothing else does no better than chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from neuroscope_vllm.core.autointerp.negatives import Negatives
from neuroscope_vllm.core.examples import Example, ExampleStore
from neuroscope_vllm.core.examples.records import SAMPLE

FEWEST = 5
"""A score of fewer texts of either class says nothing."""
MARKED_FROM = 0.3
"""Of the example's largest activation; delphi's threshold."""


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """A text to judge.

    Attributes:
        id: `sequence:position` in the corpus, of the example's token or of the context's first.
        fires: Whether the feature does, on some token of it.
        hard: A neighbour of the feature fires, and it does not.
        tokens: Their texts.
        marked: Whether each is marked, where marks are shown.
    """

    id: str
    fires: bool
    hard: bool = False
    tokens: list[str]
    marked: list[bool]


def choose_texts(
    store: ExampleStore, contexts: Negatives, feature: int, positives: int, negatives: int
) -> list[Text]:
    """Texts of both classes in random order, the same each time; none if there are too few.

    Args:
        positives, negatives: How many of each, at most.
    """
    draw = np.random.default_rng([feature, 20241013])
    examples = _spread(_apart(store, store.of(feature)), positives)
    if len(examples) < FEWEST:
        return []
    firing = [_positive(example) for example in examples]
    # The hard ones take after the longest, so that as little as can be is cut off them.
    firing.sort(key=lambda text: -len(text.tokens))
    hard, random = contexts.choose(feature, negatives, draw)
    if len(hard) + len(random) < FEWEST:
        return []
    like = itertools.cycle(firing)
    silent = [_negative(*contexts.text(c), next(like), hard=True) for c in hard]
    silent += [_negative(*contexts.text(c), next(like), hard=False) for c in random]
    texts = firing + silent
    return [texts[i] for i in draw.permutation(len(texts))]


def _apart(store: ExampleStore, examples: Iterable[Example]) -> list[Example]:
    """Held-out examples no two of which share a token: the sample's first, then the strongest."""
    window = store.collection.before + 1 + store.collection.after
    taken: dict[int, list[int]] = {}
    found: list[Example] = []
    held_out = [example for example in examples if example.held_out]
    for example in sorted(held_out, key=lambda example: example.kind != SAMPLE):
        others = taken.setdefault(example.sequence, [])
        if all(abs(example.position - other) >= window for other in others):
            others.append(example.position)
            found.append(example)
    return found


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """As many, evenly over the quantiles of the activation.

    The strongest of all firings serve only where the sample, which is spread as the corpus is, has
    too few.
    """
    sample = [example for example in examples if example.kind == SAMPLE]
    pool = sample if len(sample) >= count else examples[:count]
    ordered = sorted(pool, key=lambda example: (example.activation, example.sequence))
    if len(ordered) <= count:
        return ordered
    at = ((np.arange(count) + 0.5) * len(ordered) / count).astype(int)
    return [ordered[i] for i in at]


def _positive(example: Example) -> Text:
    least = MARKED_FROM * max(example.activations)
    return Text(
        id=f"{example.sequence}:{example.position}",
        fires=True,
        tokens=example.tokens,
        marked=[value >= least for value in example.activations],
    )


def _negative(name: str, tokens: list[str], like: Text, *, hard: bool) -> Text:
    """As long as a positive, and marked in the same places, which here mean nothing."""
    length = min(len(tokens), len(like.tokens))
    return Text(
        id=name, fires=False, hard=hard, tokens=tokens[:length], marked=like.marked[:length]
    )
