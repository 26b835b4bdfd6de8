"""What is kept of a corpus, against brute force, however the corpus is cut and put together."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from neuroscope_vllm.core.examples import merge
from neuroscope_vllm.core.examples import pairs as pair_rules
from neuroscope_vllm.core.examples.choice import PLACE_BITS, Table
from neuroscope_vllm.core.examples.gather import Gathered
from neuroscope_vllm.core.examples.hashes import context_hashes, held_out, idents
from neuroscope_vllm.core.examples.merge import MAX_CONTEXTS, Merged
from neuroscope_vllm.core.examples.pairs import MIN_COUNT, PairCounts, Pairs, partners
from neuroscope_vllm.core.passes import ExamplesPass, Floors, Rows
from neuroscope_vllm.core.sae.sae import SAE
from tests.support.encoding import by_hand

WIDTH, SPECIAL = 8, 1
WHAT = ExamplesPass(special_ids=[SPECIAL], sink_norm={20: 11.0}, before=2, after=1, top=3, sample=4)


class Text(NamedTuple):
    """A sequence: token ids [n], and what each feature does on each of them [n, WIDTH]."""

    token_id: NDArray[np.int64]
    activation: NDArray[np.float32]


def corpus(seed: int, sequences: int, words: int = 5) -> list[Text]:
    """Few words, so contexts recur; few activations, so they tie; and some rows are sinks."""
    draw = np.random.default_rng(seed)
    texts = []
    for _ in range(sequences):
        length = draw.integers(1, 14)
        activation = draw.choice([0, 0, 0, 2, 3, 4], (length, WIDTH)).astype(np.float32)
        activation[draw.random(length) < 0.1] *= 3
        texts.append(Text(draw.integers(0, words, length), activation))
    return texts


SAE_BY_HAND = by_hand(torch.full((WIDTH,), 1.0))


def gathered(texts: list[Text], seed: int = 0, floors: Floors | None = None) -> Gathered:
    """As an engine does: rows in pieces, mixed up, and sequences numbered from anywhere."""
    what = msgspec.structs.replace(WHAT, floors={20: floors} if floors else {})
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(what), type=ExamplesPass)
    gatherer = sent.gather(20, SAE_BY_HAND)
    sequence = np.repeat(np.arange(len(texts)), [len(text.token_id) for text in texts]) + seed
    position = np.concatenate([np.arange(len(text.token_id)) for text in texts])
    token_id = np.concatenate([text.token_id for text in texts])
    residual = np.concatenate([text.activation for text in texts])
    order = np.random.default_rng(seed).permutation(len(sequence))
    for part in np.array_split(order, 3):
        columns = (sequence[part], position[part], token_id[part], residual[part])
        gatherer.add(Rows(*map(torch.from_numpy, columns)))
    return ExamplesPass.read(gatherer.result())


def merged(chunks: list[tuple[int, Gathered]]) -> Merged:
    total = Merged(chunks[0][1], WHAT.top, WHAT.sample)
    for first, chunk in chunks:
        total.add(chunk, first)
    return total


def heard(text: Text) -> NDArray[np.float32]:
    """Activations without those of special tokens and sinks."""
    silent = (text.token_id == SPECIAL) | (np.linalg.norm(text.activation, axis=1) > 11.0)
    return np.where(silent[:, None], 0, text.activation)


class Kept(NamedTuple):
    """(sequence, position, activation) of one feature, in order, and each one's surroundings."""

    top: list[tuple[int, int, float]]
    sample: list[tuple[int, int, float]]
    around: dict[tuple[int, int], dict[int, float]]


def by_brute_force(texts: list[Text], feature: int) -> Kept:
    hashes = [context_hashes(t.token_id, np.zeros(len(t.token_id), int), 2) for t in texts]
    found = [
        (number, position, float(value))
        for number, text in enumerate(texts)
        for position, value in enumerate(heard(text)[:, feature])
        if value
    ]

    def context(one: tuple[int, int, float]) -> tuple[int, ...]:
        return tuple(texts[one[0]].token_id[max(one[1] - 2, 0) : one[1] + 1].tolist())

    def chance(one: tuple[int, int, float]) -> int:
        bits = WIDTH.bit_length()
        return int(idents(np.array([feature]), hashes[one[0]][one[1] : one[1] + 1], bits)[0])

    strongest = sorted(found, key=lambda one: (-one[2], one[0], one[1]))
    best = {context(one): one for one in reversed(strongest)}
    first = {context(one): one for one in reversed(found)}
    top = sorted(best.values(), key=strongest.index)[: WHAT.top]
    sample = sorted(first.values(), key=chance)[: WHAT.sample]
    around = {}
    for number, position, _ in [*top, *sample]:
        column = heard(texts[number])[:, feature]
        window = range(max(position - 2, 0), min(position + 2, len(column)))
        around[number, position] = {i - position: float(column[i]) for i in window if column[i]}
    return Kept(top, sample, around)


def kept(total: Merged, feature: int) -> Kept:
    table, choice = total.examples.kept()
    features = total.examples.feature(table.ident)
    lists = lists_of(table)

    def rows(chosen: NDArray[np.intp]) -> list[int]:
        return [int(row) for row in chosen if features[row] == feature]

    def one(row: int) -> tuple[int, int, float]:
        return (*place(table, row), float(table.activation[row]))

    either = rows(choice.either)
    return Kept(
        [one(row) for row in rows(choice.top)],
        [one(row) for row in rows(choice.sample)],
        {place(table, row): lists[row] for row in either},
    )


def place(table: Table, row: int) -> tuple[int, int]:
    return int(table.place[row] >> PLACE_BITS), int(table.place[row] & (1 << PLACE_BITS) - 1)


def lists_of(table: Table) -> list[dict[int, float]]:
    bounds = pairwise([0, *np.cumsum(table.size).tolist()])
    return [
        dict(zip(table.item[a:b].tolist(), table.value[a:b].tolist(), strict=True))
        for a, b in bounds
    ]


def test_a_chunk_is_what_brute_force_finds() -> None:
    texts = corpus(0, 60)
    total = merged([(0, gathered(texts))])
    activation = np.concatenate([heard(text) for text in texts])
    assert_array_equal(total.firings, (activation > 0).sum(axis=0))
    assert_array_equal(total.maximum, activation.max(axis=0))
    for feature in range(WIDTH):
        assert kept(total, feature) == by_brute_force(texts, feature)
    silent = sum(int((np.abs(text.activation).sum(1) > 0).sum()) for text in texts)
    assert 0 < total.tokens < silent + sum(int((t.activation.sum(1) == 0).sum()) for t in texts)


def test_contexts_are_stretches_of_held_out_text_with_all_that_fires_there() -> None:
    texts = corpus(1, 200, words=9)
    total = merged([(0, gathered(texts))])
    length = WHAT.before + 1 + WHAT.after
    expected = {}
    for number, text in enumerate(texts):
        if held_out(text.token_id):
            for at in range(0, len(text.token_id) - length + 1, length):
                words = tuple(text.token_id[at : at + length].tolist())
                largest = heard(text)[at : at + length].max(axis=0)
                there = {f: float(v) for f, v in enumerate(largest) if v}
                expected.setdefault(words, ((number, at), there))
    table, _ = total.contexts.kept()
    found = {place(table, row): there for row, there in enumerate(lists_of(table))}
    assert found == dict(expected.values())
    assert 50 < len(found) < sum(len(text.token_id) // length for text in texts) * 2 / 3


def everything(total: Merged) -> list[NDArray[np.generic]]:
    found: list[NDArray[np.generic]] = [np.array(total.tokens), total.firings, total.maximum]
    for best in (total.examples, total.contexts):
        table, choice = best.kept()
        found += [*table, *choice]
    return found


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    cuts=st.sets(st.integers(1, 39), max_size=12),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_cut_any_order_and_any_floors_end_alike(seed: int, cuts: set[int], shuffle) -> None:
    texts = corpus(seed, 40, words=3 + seed % 9)
    whole = merged([(0, gathered(texts))])
    bounds = list(pairwise([0, *sorted(cuts), 40]))
    shuffle.shuffle(bounds)
    known: list[Floors] = []  # those of any moment before
    total = None
    for first, stop in bounds:
        floors = shuffle.choice([*known, None])
        part = gathered(texts[first:stop], shuffle.randint(0, 99), floors)
        total = total or Merged(part, WHAT.top, WHAT.sample)
        total.add(part, first)
        known.append(total.floors())
    assert total is not None
    for ours, theirs in zip(everything(total), everything(whole), strict=True):
        assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", range(20))
def test_what_only_just_is_kept_passes_the_floors(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later half first, so that of each context an earlier token may still come."""
    monkeypatch.setattr(merge, "MAX_CONTEXTS", 5)
    texts = corpus(seed, 60, words=2 + seed % 2)
    later = merged([(30, gathered(texts[30:]))])
    later.add(gathered(texts[:30], floors=later.floors()), 0)
    whole = merged([(0, gathered(texts))])
    for ours, theirs in zip(everything(later), everything(whole), strict=True):
        assert_array_equal(ours, theirs)


def test_floors_save_what_need_not_be_sent() -> None:
    texts = corpus(2, 300, words=40)
    first = merged([(0, gathered(texts[:200]))])
    free, held = gathered(texts[200:]), gathered(texts[200:], floors=first.floors())
    assert len(held.examples.ident) < len(free.examples.ident)
    assert len(held.contexts.ident) == len(free.contexts.ident) < MAX_CONTEXTS


def test_pairs_are_those_of_the_strongest_features_and_seen_twice() -> None:
    draw = np.random.default_rng(0)
    width, tokens = 40, 400
    strongest = np.full((tokens, pair_rules.STRONGEST), -1, np.int32)
    expected: Counter[tuple[int, int]] = Counter()
    for row in strongest:
        features = draw.permutation(width)[: draw.integers(0, pair_rules.STRONGEST + 1)]
        row[: len(features)] = features
        expected.update(combinations(sorted(features.tolist()), 2))
    found = pair_rules.count_pairs(strongest, width)
    counted = {
        (k // width, k % width): n for k, n in zip(*map(np.ndarray.tolist, found), strict=True)
    }
    assert counted == {pair: n for pair, n in expected.items() if n >= MIN_COUNT}
    partner_of: dict[int, list[tuple[int, int]]] = {}
    columns = map(np.ndarray.tolist, partners(found, width, range(5, 30)))
    for feature, partner, count in zip(*columns, strict=True):
        partner_of.setdefault(feature, []).append((-count, partner))
    for feature in range(5, 30):
        both = [(-n, a + b - feature) for (a, b), n in counted.items() if feature in (a, b)]
        assert partner_of[feature] == sorted(both)[: pair_rules.PARTNERS]
    assert set(partner_of) == set(range(5, 30))


def test_the_sixteen_strongest_of_a_token_are_paired() -> None:
    width = 40
    like = by_hand(torch.full((WIDTH,), 1.0)).info
    info = msgspec.structs.replace(like, d_model=width, width=width)
    eye, zeros = torch.eye(width), torch.zeros(width)
    sae = SAE(eye, zeros, torch.full((width,), 0.1), eye, zeros, info)
    gatherer = ExamplesPass(
        special_ids=[], sink_norm={}, before=2, after=1, top=3, sample=3
    ).gather(0, sae)
    residual = torch.rand(30, width, generator=torch.Generator().manual_seed(0)) + 0.2
    residual[10:, 12:] = 0  # fewer than sixteen
    ids = torch.arange(30)
    gatherer.add(Rows(torch.zeros(30, dtype=torch.int64), ids, ids, residual))
    expected: Counter[int] = Counter()
    for row in residual.numpy():
        features = np.argsort(-row)[: min(16, int((row > 0).sum()))]
        expected.update(a * width + b for a, b in combinations(sorted(features.tolist()), 2))
    found = ExamplesPass.read(gatherer.result()).pairs
    assert dict(zip(*map(np.ndarray.tolist, found), strict=True)) == {
        key: n for key, n in expected.items() if n > 1
    }


def test_pairs_are_bounded_and_the_frequent_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_rules, "MAX_PAIRS", 1000)
    counts = PairCounts()
    frequent = np.arange(0, 50_000, 1000)
    draw = np.random.default_rng(0)
    for _ in range(200):
        key = np.union1d(frequent, draw.choice(50_000, 800, replace=False))
        together = np.where(np.isin(key, frequent), 9, 2).astype(np.int32)
        counts.add(Pairs(key, together))
    total = counts.total()
    assert len(total.key) <= 1000
    assert_array_equal(total.key[total.together >= 9 * 200], frequent)


def test_nothing_fires() -> None:
    silent = [Text(np.array([1, 2, 3]), np.zeros((3, WIDTH), np.float32))] * 3
    total = merged([(0, gathered(silent)), (3, gathered(corpus(3, 5)))])
    assert total.tokens > 0
    empty = merged([(0, gathered(silent))])
    assert empty.examples.kept()[0].ident.size == 0
    assert empty.firings.sum() == 0


def test_what_is_kept_and_what_is_sent_do_not_grow_with_the_corpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merge, "MAX_CONTEXTS", 100)
    total, sent = None, []
    for number in range(40):
        floors = total.floors() if total else None
        part = gathered(corpus(number, 50, words=100), floors=floors)
        total = total or Merged(part, WHAT.top, WHAT.sample)
        total.add(part, 50 * number)
        sent.append(len(part.examples.ident) + len(part.contexts.ident))
    assert total is not None
    assert max(sent[20:]) < sent[0] / 2
    examples, contexts = (best.kept()[0] for best in (total.examples, total.contexts))
    assert len(examples.ident) <= WIDTH * (WHAT.top + WHAT.sample)
    assert len(examples.item) <= len(examples.ident) * (WHAT.before + 1 + WHAT.after)
    assert len(contexts.ident) == 100
