"""Features of token prefixes seen before, for positions that vLLM serves from its prefix cache.

A residual depends on the tokens up to its own position, and on what `prefix_root` stands for, and
on nothing else. So rows of an earlier request with the same prefix are the rows of this one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import chain

from neuroscope_vllm.core import wire
from neuroscope_vllm.server.rows import Row, Rows, unpack_layer

BLOCK = 16
"""Tokens per entry. vLLM caches whole blocks, of this size or a multiple of it."""
LATE = 4096
"""Tokens by which the word that a request is steered otherwise may come after its rows."""
ENTRY_OVERHEAD_BYTES = 400
"""What an entry costs beside its arrays: dictionary, digest, objects."""

Block = list[wire.LayerFeatures]


class PrefixCache:
    """Blocks of rows by the rolling digest of all tokens up to their end.

    Bounded in bytes; the least recently used block goes first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, digest: bytes) -> Block | None:
        block = self._blocks.get(digest)
        if block is None:
            self.misses += 1
            return None
        self.hits += 1
        self._blocks.move_to_end(digest)
        return block

    def forget(self, digest: bytes) -> None:
        block = self._blocks.pop(digest, None)
        if block is not None:
            self.bytes -= _size(block)

    def put(self, digest: bytes, block: Block) -> None:
        replaced = self._blocks.pop(digest, None)
        self.bytes += _size(block) - (_size(replaced) if replaced is not None else 0)
        self._blocks[digest] = block
        while self.bytes > self._max_bytes:
            self.bytes -= _size(self._blocks.popitem(last=False)[1])


class PrefixWalk:
    """One choice's way along its own tokens: what it knows goes in, what others knew comes out.

    Positions are taken in order, from 0, each once.
    """

    def __init__(
        self, cache: PrefixCache, root: bytes, edited_from: int | None = None, salt: bytes = b""
    ) -> None:
        """Blocks that end past `edited_from` are those of requests with an equal `salt`."""
        self._cache = cache
        self._digest = root
        self._end = 0  # of the blocks that are whole
        self._edited_from, self._salt = edited_from, salt
        self._put: deque[tuple[int, bytes]] = deque(maxlen=LATE // BLOCK)  # ends and digests
        self._ids = array("i")  # of the block that has begun
        self._rows: list[list[Row]] = []  # likewise, of each layer; fewer where one is missing

    def edit_from(self, position: int, salt: bytes) -> None:
        """It is steered otherwise from `position` on. Rows of it that came before the word of the
        change did are nobody else's."""
        for end, digest in self._put:
            if end > position:
                self._cache.forget(digest)
        before = self._edited_from
        self._edited_from = position if before is None else min(before, position)
        self._salt = salt

    def knows(self, salt: bytes) -> bool:
        """Whether it is steered as `salt` says."""
        return salt == self._salt

    def add(self, token_id: int, rows: Rows | None, row: int) -> None:
        """The next position and its row, None if it has none."""
        self._ids.append(token_id)
        if rows is not None:
            self._rows.append([layer[row] for layer in rows.layers])
        if len(self._ids) < BLOCK:
            return
        self._turn()
        if len(self._rows) == BLOCK:
            # Also where it is known: the model's weights may have been replaced since.
            block = pack(self._rows)
            if block is not None:
                self._cache.put(self._digest, block)
                self._put.append((self._end, self._digest))
        self._rows = []

    def read(self, token_ids: Iterable[int]) -> Iterator[tuple[int, Rows | None, int]]:
        """The next positions, which others may know: (token id, rows, row in them)."""
        ids = array("i", token_ids)
        while ids:
            begun = len(self._ids)
            part, ids = ids[: BLOCK - begun], ids[BLOCK - begun :]
            self._ids.extend(part)
            rows = None
            if len(self._ids) == BLOCK:
                self._turn()
                self._rows = []
                block = self._cache.get(self._digest)
                if block is not None:
                    rows = Rows([], [], [unpack_layer(layer, BLOCK) for layer in block])
            for row, token_id in enumerate(part, begun):
                yield token_id, rows, row

    def _turn(self) -> None:
        """The block is whole: its digest covers all tokens up to its end."""
        self._end += BLOCK
        edited = self._edited_from is not None and self._end > self._edited_from
        what = self._digest + self._ids.tobytes() + (self._salt if edited else b"")
        self._digest = hashlib.blake2b(what, digest_size=16).digest()
        self._ids = array("i")


def pack(rows: list[list[Row]]) -> Block | None:
    """Rows of many messages, each of all layers, as arrays; None if those are not the same ones."""
    if any(len(row) != len(rows[0]) for row in rows):
        return None
    block: Block = []
    for columns in zip(*rows, strict=True):
        layers, index, activation, score, l0, sink = zip(*columns, strict=True)
        if len(set(layers)) > 1:
            return None
        block.append(
            wire.LayerFeatures(
                layer=layers[0],
                top_k=len(index[0]),
                index=array("i", chain.from_iterable(index)).tobytes(),
                activation=array("f", chain.from_iterable(activation)).tobytes(),
                score=array("f", chain.from_iterable(score)).tobytes(),
                l0=array("i", l0).tobytes(),
                sink=bytes(sink),
            )
        )
    return block


def _size(block: Block) -> int:
    return ENTRY_OVERHEAD_BYTES + sum(
        len(one.index) + len(one.activation) + len(one.score) + len(one.l0) + len(one.sink) + 200
        for one in block
    )
