"""What a corpus pass brings home of one chunk: the worker's half of `collect`.

All that fires in the chunk is kept until its end, at 12 bytes a firing, since a token's context may
come after it and in any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from neuroscope_vllm.core.examples.choice import PLACE_BITS, Table, choose, order, ranges
from neuroscope_vllm.core.examples.hashes import context_hashes, held_out, idents
from neuroscope_vllm.core.examples.pairs import STRONGEST, Pairs, count_pairs
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sae.sparse import Firings, encode_sparse

if TYPE_CHECKING:
    from neuroscope_vllm.core.passes import ExamplesPass, Rows


class Gathered(NamedTuple):
    """What one layer's SAE found in a chunk; sequences are numbered within it.

    Attributes:
        sae_digest: Of the SAE's weights.
        tokens: Those that features could fire on.
        firings: int64 [width], tokens that each feature fired on.
        maximum: float32 [width], its largest activation, or 0.
        examples: Of each feature; lists have the positions around, relative to the token's own, on
            which the feature fires, and its activations there.
        contexts: Stretches of held-out sequences, as of one feature, 0; `place` is a stretch's
            first token, and lists have the features that fire in it, and the largest activation of
            each.
        pairs: Features that fire together.
    """

    sae_digest: str
    tokens: int
    firings: NDArray[np.int64]
    maximum: NDArray[np.float32]
    examples: Table
    contexts: Table
    pairs: Pairs

    def to_bytes(self) -> bytes:
        return save(
            {
                "sae_digest": np.frombuffer(self.sae_digest.encode(), np.uint8),
                "tokens": np.array([self.tokens]),
                "firings": self.firings,
                "maximum": self.maximum,
                "pairs.key": self.pairs.key,
                "pairs.together": self.pairs.together,
                **{f"examples.{k}": v for k, v in self.examples._asdict().items()},
                **{f"contexts.{k}": v for k, v in self.contexts._asdict().items()},
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Gathered:
        """Raises SafetensorError, KeyError: These are no such bytes."""
        found = load(data)
        return cls(
            sae_digest=found["sae_digest"].tobytes().decode(),
            tokens=int(found["tokens"][0]),
            firings=found["firings"],
            maximum=found["maximum"],
            examples=Table(**{name: found[f"examples.{name}"] for name in Table._fields}),
            contexts=Table(**{name: found[f"contexts.{name}"] for name in Table._fields}),
            pairs=Pairs(found["pairs.key"], found["pairs.together"]),
        )


class _Tokens(NamedTuple):
    """The chunk's n tokens, by sequence, then position.

    Attributes:
        sequence, position, token_id: int64 [n].
        start, stop: int64 [n], where each one's sequence begins and ends.
    """

    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    token_id: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]

    @property
    def place(self) -> NDArray[np.int64]:
        return (self.sequence << PLACE_BITS) | self.position


class _Fired(NamedTuple):
    """The chunk's m firings, by feature, then token.

    Attributes:
        key: int64 [m], feature * tokens + token.
        feature: int64 [m].
        token: int64 [m], index into `_Tokens`.
        activation: float32 [m].
        starts: int64 [width + 1], where each feature's begin.
    """

    key: NDArray[np.int64]
    feature: NDArray[np.int64]
    token: NDArray[np.int64]
    activation: NDArray[np.float32]
    starts: NDArray[np.int64]


class GatheringExamples:
    """See `passes.Gatherer`."""

    def __init__(self, what: ExamplesPass, layer: int, sae: SAE) -> None:
        self._what = what
        self._sae = sae
        self._special = torch.tensor(what.special_ids, dtype=torch.int64)
        self._sink_norm = what.sink_norm.get(layer, float("inf"))
        self._floors = what.floors.get(layer)
        self._rows: list[tuple[NDArray[np.int64], ...]] = []
        self._firings: list[tuple[NDArray[np.integer | np.floating], ...]] = []
        self._strongest: list[NDArray[np.int32]] = []
        self._tokens = 0

    def add(self, rows: Rows) -> None:
        self._rows.append(tuple(column.numpy() for column in rows[:3]))
        ordinary = ~torch.isin(rows.token_id, self._special)
        residual = rows.residual[ordinary.to(rows.residual.device)].float()
        norm = torch.linalg.vector_norm(residual, dim=1)
        heard = (norm <= self._sink_norm).nonzero().squeeze(1)
        firings = encode_sparse(self._sae, residual[heard])
        counts = torch.bincount(firings.row, minlength=len(heard))
        self._strongest.append(_strongest(firings, counts).cpu().numpy())
        self._tokens += len(heard)
        per_row = np.zeros(len(rows.token_id), np.int64)
        per_row[ordinary.nonzero().squeeze(1)[heard.cpu()].numpy()] = counts.cpu().numpy()
        fired = (firings.feature.int().cpu().numpy(), firings.activation.cpu().numpy())
        self._firings.append((per_row, *fired))

    def result(self) -> bytes:
        width = self._sae.width
        tokens, arrival = _in_order(self._rows)
        fired = _by_feature(self._firings, arrival, width)
        counts = np.diff(fired.starts)
        maximum = np.zeros(width, np.float32)
        silent = counts == 0
        if len(fired.key):
            maximum[~silent] = np.maximum.reduceat(fired.activation, fired.starts[:-1][~silent])
        strongest = np.concatenate(self._strongest)
        return Gathered(
            sae_digest=self._sae.digest,
            tokens=self._tokens,
            firings=counts,
            maximum=maximum,
            examples=self._examples(tokens, fired),
            contexts=self._contexts(tokens, fired),
            pairs=count_pairs(strongest, width),
        ).to_bytes()

    def _examples(self, tokens: _Tokens, fired: _Fired) -> Table:
        what, width = self._what, self._sae.width
        bits = width.bit_length()
        context = context_hashes(tokens.token_id, tokens.start, what.before)
        ident = idents(fired.feature, context[fired.token], bits)
        floor = np.zeros(width, np.float32)
        wanted = np.arange(len(ident))
        if self._floors:
            floor = np.frombuffer(self._floors.activation, np.float32)
            last = np.frombuffer(self._floors.ident, np.uint64)
            counts = np.diff(fired.starts)
            strong = fired.activation >= np.repeat(floor, counts)
            wanted = np.flatnonzero(strong | (ident <= np.repeat(last, counts)))
        place = tokens.place[fired.token[wanted]]
        wanted_order = order(ident[wanted], place)
        wanted, place = wanted[wanted_order], place[wanted_order]
        ident, activation = ident[wanted], fired.activation[wanted]
        kept = choose(ident, place, activation, bits, what.top, what.sample, floor).either
        size, item, value = self._around(tokens, fired, wanted[kept])
        return Table(ident[kept], place[kept], activation[kept], size, item, value)

    def _around(
        self, tokens: _Tokens, fired: _Fired, firing: NDArray[np.intp]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """What the same feature does around some firings."""
        token = fired.token[firing]
        base = fired.key[firing] - token
        begin = np.maximum(token - self._what.before, tokens.start[token])
        end = np.minimum(token + self._what.after + 1, tokens.stop[token])
        first = np.searchsorted(fired.key, base + begin)
        size = np.searchsorted(fired.key, base + end) - first
        inside = ranges(first, size)
        item = fired.token[inside] - np.repeat(token, size)
        return size.astype(np.int32), item.astype(np.int32), fired.activation[inside]

    def _contexts(self, tokens: _Tokens, fired: _Fired) -> Table:
        """Stretches of those sequences that are held out, one after another, all of one length."""
        length = self._what.before + 1 + self._what.after
        starts = np.unique(tokens.start)
        spared = [s for s in starts.tolist() if held_out(tokens.token_id[s : tokens.stop[s]])]
        first = np.concatenate(
            [np.arange(s, tokens.stop[s] - length + 1, length) for s in spared]
            or [np.empty(0, np.int64)]
        )
        whole = context_hashes(tokens.token_id, tokens.start, length - 1)[first + length - 1]
        ident = idents(np.zeros(len(first), np.int64), whole, 1)
        if self._floors:
            fits = ident <= np.uint64(self._floors.context)
            first, ident = first[fits], ident[fits]
        stretch = np.full(len(tokens.token_id), -1)
        stretch[ranges(first, np.full(len(first), length))] = np.repeat(
            np.arange(len(first)), length
        )
        within = np.flatnonzero(stretch[fired.token] >= 0)
        number, feature = stretch[fired.token[within]], fired.feature[within]
        fresh = np.flatnonzero(
            (np.diff(number, prepend=-1) != 0) | (np.diff(feature, prepend=-1) != 0)
        )
        value = fired.activation[within]
        largest = np.maximum.reduceat(value, fresh) if len(fresh) else value
        by_stretch = np.argsort(number[fresh], kind="stable")
        table = Table(
            ident,
            tokens.place[first],
            np.zeros(len(first), np.float32),
            np.bincount(number[fresh], minlength=len(first)).astype(np.int32),
            feature[fresh][by_stretch].astype(np.int32),
            largest[by_stretch],
        )
        return table.take(order(table.ident, table.place))


def _strongest(firings: Firings, counts: Tensor) -> Tensor:
    """int32 [n, STRONGEST], the features of each row that fire strongest; -1: no more fire."""
    most = max(int(counts.max()) if len(counts) else 0, STRONGEST)
    first = counts.cumsum(0) - counts
    column = torch.arange(len(firings.row), device=counts.device) - first[firings.row]
    activation = torch.zeros(len(counts), most, device=counts.device)
    activation[firings.row, column] = firings.activation
    value, column = activation.topk(STRONGEST, dim=1)
    if not len(firings.row):
        return torch.full_like(column, -1, dtype=torch.int32)
    at = (first[:, None] + column).clamp_(max=len(firings.row) - 1)
    return torch.where(value > 0, firings.feature[at], -1).int()


def _in_order(rows: list[tuple[NDArray[np.int64], ...]]) -> tuple[_Tokens, NDArray[np.intp]]:
    """The chunk's tokens, and which row each was among those that came."""
    sequence, position, token_id = map(np.concatenate, zip(*rows, strict=True))
    arrival = np.lexsort((position, sequence))
    sequence, position = sequence[arrival], position[arrival]
    start = np.searchsorted(sequence, sequence)
    stop = np.searchsorted(sequence, sequence, side="right")
    numbered = np.cumsum(np.diff(sequence, prepend=sequence[:1]) != 0)  # vLLM's go on over runs
    return _Tokens(numbered, position, token_id[arrival], start, stop), arrival


def _by_feature(
    firings: list[tuple[NDArray[np.integer | np.floating], ...]],
    arrival: NDArray[np.intp],
    width: int,
) -> _Fired:
    """Sorts what came by row."""
    counts, feature, activation = map(np.concatenate, zip(*firings, strict=True))
    starts = np.cumsum(counts) - counts
    by_token = ranges(starts[arrival], counts[arrival])
    token = np.repeat(np.arange(len(arrival)), counts[arrival])
    feature = feature[by_token]
    found = _counting_sort(feature)
    index, token = by_token[found], token[found]
    feature = feature[found].astype(np.int64)
    bounds = np.searchsorted(feature, np.arange(width + 1))
    return _Fired(feature * len(arrival) + token, feature, token, activation[index], bounds)


def _counting_sort(column: NDArray[np.int32]) -> NDArray[np.intp]:
    """Indices that sort it, stable. numpy sorts 16 bits at a time in linear time, more do not."""
    found = np.argsort(column.astype(np.uint16), kind="stable")
    if len(column) and column.max() >= 1 << 16:
        found = found[np.argsort((column[found] >> 16).astype(np.uint16), kind="stable")]
    return found
