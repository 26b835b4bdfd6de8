"""Joins the scheduler's truth about tokens with the workers' feature rows, by position.

Pure and synchronous: messages in, ordered `Placed`, `Gap` and `Done` out; time is an argument.
Every position of a choice comes out exactly once, in order, with the token that stands there.

A residual depends on the tokens up to its own position only. So a row is right if and only if
its token, and the tokens of all earlier rows of its span, are the ones that stand: that one test
removes rejected drafts, whatever the engine speculates, replays or runs in vain.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from typing import NamedTuple

from neuroscope_vllm.server.prefix import PrefixCache, PrefixWalk
from neuroscope_vllm.server.rows import Rows

FINISH_WAIT_S = 2.0
"""How long a finished choice waits for rows that are still on their way."""
ORPHAN_WAIT_S = 5.0
"""How long rows wait for a RequestStarted that comes on another socket."""
ORPHAN_SHARE = 0.5
"""Of what all waiting rows may take."""
ENDED_IDS = 32_768
"""More than all engines together tell again after a loss."""


class Placed(NamedTuple):
    """A token in its place. `rows` is None where there are no features.

    A `cached` one did not run: its rows are those of an earlier request with the same prefix.
    """

    position: int
    token_id: int
    rows: Rows | None = None
    row: int = 0
    cached: bool = False


class Gap(NamedTuple):
    """Features of positions [start, stop) were lost; the tokens follow without."""

    start: int
    stop: int


class Done(NamedTuple):
    finish_reason: str


Item = Placed | Gap | Done


class Budget:
    """Bytes that all choices, and all rows that wait, take together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.choices = 0
        self.rows = 0

    @property
    def exceeded(self) -> bool:
        return self.choices + self.rows > self.limit


class _Span:
    """Rows [next, stop) of a message that still have to be placed, and their bytes if kept."""

    __slots__ = ("bytes", "next", "rows", "stop")

    def __init__(self, rows: Rows, start: int, stop: int, size: int = 0) -> None:
        self.rows = rows
        self.next = start
        self.stop = stop
        self.bytes = size

    def rest(self) -> _Span:
        """What is not placed, for itself."""
        rows = self.rows.part(self.next, self.stop)
        return _Span(rows, 0, self.stop - self.next, rows.bytes)


class Choice:
    """The context of one choice as known so far, and how much of it has come out."""

    def __init__(
        self, prompt_ids: list[int], walk: PrefixWalk, counters: Counter[str], budget: Budget
    ) -> None:
        self.ids = array("i", prompt_ids)
        self.prompt_tokens = len(prompt_ids)
        self.cached_tokens: int | None = None
        """None until the scheduler has said how many come from the prefix cache; rows wait."""
        self.dropped = 0
        self.next = 0
        self.ended = False
        self.deadline: float | None = None
        self._finish_reason: str | None = None
        self._computed_tokens: int | None = None
        self._held: deque[_Span] = deque()
        self._budget = budget
        self._walk = walk
        self._counters = counters

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def add(self, rows: Rows, start: int, stop: int) -> list[Item]:
        """Take the rows [start, stop) of a message."""
        out: list[Item] = []
        span = _Span(rows, start, stop)
        self._place(span, out)
        if span.next < span.stop:
            self._hold(span.rest())
        self._maybe_end(out)
        return out

    def edit_from(self, position: int, salt: bytes) -> None:
        """It is steered otherwise from `position` on; as in `PrefixWalk`."""
        self._walk.edit_from(position, salt)

    def is_edited_by(self, salt: bytes) -> bool:
        return self._walk.knows(salt)

    def scheduled(self, cached_tokens: int) -> list[Item]:
        """It runs, and the first `cached_tokens` positions do not."""
        out: list[Item] = []
        if self.cached_tokens is None:
            self.cached_tokens = cached_tokens
            self._counters["prompt_tokens_cached"] += cached_tokens
            self._retry(out)
            self._maybe_end(out)
        return out

    def extend(
        self,
        token_ids: list[int],
        finish_reason: str | None,
        now: float,
        computed_tokens: int | None = None,
    ) -> list[Item]:
        """More tokens stand, perhaps the last ones; of a choice that is not finished.

        A finished one ends at once, or when the rows on their way have arrived. Positions from
        `computed_tokens` on never ran.
        """
        self.ids.extend(token_ids)
        self._counters["tokens"] += len(token_ids)
        if finish_reason is not None:
            self._finish_reason = finish_reason
            self._computed_tokens = computed_tokens
            self.deadline = now + FINISH_WAIT_S
        out: list[Item] = []
        self._retry(out)
        self._maybe_end(out)
        return out

    def expire(self) -> list[Item]:
        """The deadline passed: what is missing will not come."""
        out: list[Item] = []
        self._skip_to(self._featured(), out)
        self._maybe_end(out)
        return out

    def _featured(self) -> int:
        """Positions below this one can have features; the last generated token never does."""
        known = len(self.ids)
        if not self.finished:
            return known
        if self._computed_tokens is not None:
            known = min(known, max(self._computed_tokens, self.next))
        generated = len(self.ids) > self.prompt_tokens
        return min(known, len(self.ids) - 1) if generated else known

    def _place(self, span: _Span, out: list[Item]) -> None:
        """Move `span` forward as far as the truth is known."""
        if self.cached_tokens is None:
            return
        ids, rows = self.ids, span.rows
        positions, token_ids = rows.positions, rows.token_ids
        known, featured = len(ids), self._featured()
        row = span.next
        while row < span.stop:
            position = positions[row]
            if position >= known:
                if self.finished:
                    self._counters["rows_after_end"] += span.stop - row
                    row = span.stop
                break
            if position < 0 or token_ids[row] != ids[position]:
                self._counters["rows_rejected"] += span.stop - row
                row = span.stop
                break
            if position < self.next:
                self._counters["rows_recomputed"] += 1
            elif position >= featured:
                self._counters["rows_after_end"] += 1
            else:
                if position > self.next:
                    self._skip_to(position, out)
                out.append(Placed(position, ids[position], rows, row))
                self._walk.add(ids[position], rows, row)
                self.next = position + 1
            row += 1
        span.next = row

    def _skip_to(self, position: int, out: list[Item]) -> None:
        """Put out the positions before `position` of which no rows came: they were cached, or
        their rows are lost.

        The cached ones wait for this until now, when all that ran before them has been heard.
        """
        cached = min(max(self.cached_tokens or 0, self.next), position)
        for token_id, rows, row in self._walk.read(self.ids[self.next : cached]):
            out.append(Placed(self.next, token_id, rows, row, cached=True))
            self.next += 1
        if self.next == position:
            return
        self.dropped += position - self.next
        self._counters["gaps_dropped"] += 1
        self._counters["positions_dropped"] += position - self.next
        out.append(Gap(self.next, position))
        for at in range(self.next, position):
            out.append(Placed(at, self.ids[at]))
            self._walk.add(self.ids[at], None, 0)
        self.next = position

    def _hold(self, span: _Span) -> None:
        self._held.append(span)
        self._budget.rows += span.bytes
        while self._budget.exceeded and self._held:
            oldest = self._held.popleft()
            self._budget.rows -= oldest.bytes
            self._counters["rows_held_too_long"] += oldest.stop - oldest.next

    def _retry(self, out: list[Item]) -> None:
        """Place held spans anew, in the order they came."""
        held = self._take_held()
        for span in held:
            self._place(span, out)
            if span.next < span.stop:
                self._hold(span)

    def _take_held(self) -> deque[_Span]:
        held, self._held = self._held, deque()
        self._budget.rows -= sum([span.bytes for span in held])
        return held

    def _maybe_end(self, out: list[Item]) -> None:
        if self._finish_reason is None or self.ended or self.next < self._featured():
            return
        for position in range(self.next, len(self.ids)):
            out.append(Placed(position, self.ids[position]))
        self.next = len(self.ids)
        self.ended = True
        self._take_held()
        out.append(Done(self._finish_reason))


class Orphan(NamedTuple):
    since: float
    internal_id: str
    rows: Rows


class Join:
    """All choices by internal id, and the rows that came before their request.

    `budget.choices` is for who starts and ends them to count.
    """

    def __init__(self, prefixes: PrefixCache, budget: Budget, counters: Counter[str]) -> None:
        self.counters = counters
        self._prefixes = prefixes
        self._choices: dict[str, Choice] = {}
        self._orphans: deque[Orphan] = deque()
        self._orphan_bytes = 0
        self._budget = budget
        self._ended: OrderedDict[int, None] = OrderedDict()  # hashes: an id may be long

    def get(self, internal_id: str) -> Choice | None:
        return self._choices.get(internal_id)

    def ended(self, internal_id: str) -> bool:
        """Whether a choice of this id came to its end, not too long ago."""
        return hash(internal_id) in self._ended

    def ignore(self, internal_id: str) -> None:
        """Treat a choice that never started as one that ended."""
        self._ended[hash(internal_id)] = None
        if len(self._ended) > ENDED_IDS:
            self._ended.popitem(last=False)

    def start(
        self,
        internal_id: str,
        prompt_ids: list[int],
        prefix_root: bytes,
        edited_from: int | None = None,
        salt: bytes = b"",
    ) -> list[Item]:
        """A choice begins; rows that came first are placed as soon as it is scheduled. The rest:
        as in `PrefixWalk`."""
        walk = PrefixWalk(self._prefixes, prefix_root, edited_from, salt)
        choice = Choice(prompt_ids, walk, self.counters, self._budget)
        self._choices[internal_id] = choice
        self._ended.pop(hash(internal_id), None)
        self.counters["prompt_tokens"] += len(prompt_ids)
        out: list[Item] = []
        mine = [orphan for orphan in self._orphans if orphan.internal_id == internal_id]
        if mine:
            self._orphans = deque(o for o in self._orphans if o.internal_id != internal_id)
        for orphan in mine:
            self._release(orphan)
            out += choice.add(orphan.rows, 0, len(orphan.rows.positions))
        return out

    def add(self, internal_id: str, rows: Rows, start: int, stop: int, now: float) -> list[Item]:
        """Rows [start, stop) of a message belong to this choice."""
        choice = self._choices.get(internal_id)
        if choice is not None:
            return self._swept(internal_id, choice, choice.add(rows, start, stop))
        if self.ended(internal_id):
            self.counters["rows_after_end"] += stop - start
        elif start < stop:
            self._adopt_later(Orphan(now, internal_id, rows.part(start, stop)))
        return []

    def scheduled(self, internal_id: str, cached_tokens: int) -> list[Item]:
        """This choice runs for the first time."""
        choice = self._choices[internal_id]
        return self._swept(internal_id, choice, choice.scheduled(cached_tokens))

    def extend(
        self,
        internal_id: str,
        token_ids: list[int],
        finish_reason: str | None,
        now: float,
        computed_tokens: int | None = None,
    ) -> list[Item]:
        """More tokens of this choice stand, perhaps the last ones."""
        choice = self._choices[internal_id]
        out = choice.extend(token_ids, finish_reason, now, computed_tokens)
        return self._swept(internal_id, choice, out)

    def tick(self, now: float) -> list[tuple[str, list[Item]]]:
        """What became due: choices past their deadline. Also drops rows nobody claimed."""
        while self._orphans and now - self._orphans[0].since > ORPHAN_WAIT_S:
            self._drop_orphan()
        due = [
            (internal_id, choice)
            for internal_id, choice in self._choices.items()
            if choice.deadline is not None and now >= choice.deadline
        ]
        return [(name, self._swept(name, choice, choice.expire())) for name, choice in due]

    def _adopt_later(self, orphan: Orphan) -> None:
        self._orphans.append(orphan)
        self._orphan_bytes += orphan.rows.bytes
        self._budget.rows += orphan.rows.bytes
        while self._orphans and (
            self._budget.exceeded or self._orphan_bytes > self._budget.limit * ORPHAN_SHARE
        ):
            self._drop_orphan()

    def _drop_orphan(self) -> None:
        orphan = self._orphans.popleft()
        self._release(orphan)
        self.counters["rows_of_unknown_request"] += len(orphan.rows.positions)

    def _release(self, orphan: Orphan) -> None:
        self._orphan_bytes -= orphan.rows.bytes
        self._budget.rows -= orphan.rows.bytes

    def _swept(self, internal_id: str, choice: Choice, out: list[Item]) -> list[Item]:
        if choice.ended:
            del self._choices[internal_id]
            self.ignore(internal_id)
        return out
