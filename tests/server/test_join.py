"""The join against a simulated engine: whatever it does, each position comes out once, in order,
with the token that stands and the features of exactly that context."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroscope_vllm.server import join as join_module
from neuroscope_vllm.server.join import Done, Gap, Item, Join, Placed
from neuroscope_vllm.server.rows import Rows

Step = tuple[int, list[int]]
"""First position and input tokens of a span."""


def rows_of(step: Step, context: list[int]) -> Rows:
    """Rows whose `layers` hold, for each row, the whole context it was computed from."""
    first, tokens = step
    seen = [tuple(context[:first] + tokens[: n + 1]) for n in range(len(tokens))]
    positions = list(range(first, first + len(tokens)))
    return Rows(positions, tokens, seen)  # type: ignore[arg-type]


class Engine:
    """Runs one choice with chunks, drafts, preemption and steps in vain, as a scheduler would."""

    def __init__(self, seed: int, prompt: list[int], output: list[int]) -> None:
        self.random = random.Random(seed)
        self.prompt, self.output = prompt, output
        self.ids = prompt + output
        self.cached = self.random.randrange(len(prompt)) if self.random.random() < 0.5 else 0
        self.worker: list[Rows] = []
        self.scheduler: list[tuple[list[int], str | None]] = []
        self._run()

    def _step(self, first: int, tokens: list[int]) -> None:
        self.worker.append(rows_of((first, tokens), self.ids))
        if self.random.random() < 0.15:
            self.worker.append(self.worker[-1])

    def _run(self) -> None:
        known, computed = len(self.prompt), self.cached
        while known < len(self.ids):
            if computed < known - 1:  # prefill, also after preemption
                size = self.random.randint(1, known - computed)
                self._step(computed, self.ids[computed : computed + size])
                computed += size
                if computed < known:
                    continue
                accepted = 0
            else:
                drafts = [self.random.randrange(3) for _ in range(self.random.randrange(4))]
                self._step(computed, [self.ids[computed], *drafts])
                accepted = 0
                while (
                    accepted < len(drafts)
                    and known + accepted < len(self.ids)
                    and drafts[accepted] == self.ids[known + accepted]
                ):
                    accepted += 1
                computed += 1
            sampled = self.ids[known : known + accepted + 1]
            computed += accepted
            known += len(sampled)
            self.scheduler.append((sampled, "stop" if known >= len(self.ids) else None))
            if self.random.random() < 0.1:
                computed = self.random.randrange(known)
        if self.random.random() < 0.5:  # scheduled ahead: the last token runs in vain
            self._step(len(self.ids) - 1, [self.ids[-1], 0, 1])

    def play(self, join: Join, worker: list[Rows]) -> list[Item]:
        """Both senders' messages, each in its own order, interleaved at random."""
        out: list[Item] = []
        truth: list[tuple[list[int], str | None] | None] = [None, *self.scheduler]
        pending = list(worker)
        while truth or pending:
            if truth and (not pending or self.random.random() < 0.5):
                message = truth.pop(0)
                if message is None:
                    out += join.start("a", self.prompt)
                elif join.get("a") is not None:
                    out += join.extend("a", *message, now=0.0)
            else:
                rows = pending.pop(0)
                out += join.add("a", rows, 0, len(rows.positions), now=0.0)
        return out


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def check(engine: Engine, out: list[Item], lost: bool) -> None:
    placed = [item for item in out if isinstance(item, Placed)]
    assert [(p.position, p.token_id) for p in placed] == list(enumerate(engine.ids))
    assert isinstance(out[-1], Done)
    assert sum(isinstance(item, Done) for item in out) == 1
    gaps = {at for gap in out if isinstance(gap, Gap) for at in range(gap.start, gap.stop)}
    for p in placed:
        if p.rows is not None:
            assert p.rows.layers[p.row] == tuple(engine.ids[: p.position + 1])
            assert p.position not in gaps
        elif not p.cached:
            assert p.position in gaps or p.position == len(engine.ids) - 1
    assert placed[-1].rows is None
    if not lost:
        assert not gaps
        assert [p.position for p in placed if p.cached] == list(range(engine.cached))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 30), tokens, tokens)
def test_every_position_once_in_order_with_its_own_features(seed, prompt, output):
    engine = Engine(seed, prompt, output)
    check(engine, engine.play(Join(), engine.worker), lost=False)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 30), tokens, tokens)
def test_lost_messages_become_gaps_never_silence(seed, prompt, output):
    engine = Engine(seed, prompt, output)
    kept = [rows for rows in engine.worker if engine.random.random() < 0.7]
    join = Join()
    out = engine.play(join, kept)
    if join.get("a") is not None:
        assert not any(isinstance(item, Done) for item in out)
        assert join.tick(join_module.FINISH_WAIT_S - 0.01) == []
        [(_, rest)] = join.tick(join_module.FINISH_WAIT_S)
        out += rest
    check(engine, out, lost=True)


def plain(first: int, tokens: list[int]) -> Rows:
    return Rows(list(range(first, first + len(tokens))), tokens, [])


def test_rejected_drafts_are_counted_and_dropped():
    join = Join()
    join.start("a", [5])
    join.add("a", plain(0, [5]), 0, 1, now=0)
    join.extend("a", [6], None, now=0)
    out = join.add("a", plain(1, [6, 7, 8]), 0, 3, now=0)
    assert [p.position for p in out if isinstance(p, Placed)] == [1]
    out = join.extend("a", [9], None, now=0)
    assert out == []
    assert join.counters["rows_rejected"] == 2


def test_a_matching_row_after_a_rejected_one_is_not_trusted():
    join = Join()
    join.start("a", [5])
    join.extend("a", [6, 9, 8], None, now=0)
    out = join.add("a", plain(0, [5, 6, 7, 8]), 0, 4, now=0)
    assert [p.position for p in out if isinstance(p, Placed)] == [0, 1]


def test_first_prompt_rows_missing_are_the_prefix_cache():
    join = Join()
    join.start("a", [5, 6, 7])
    out = join.add("a", plain(2, [7]), 0, 1, now=0)
    assert [(p.position, p.cached) for p in out if isinstance(p, Placed)] == [
        (0, True),
        (1, True),
        (2, False),
    ]
    choice = join.get("a")
    assert choice is not None
    assert choice.cached_tokens == 2


def test_a_hole_in_the_middle_is_a_gap():
    join = Join()
    join.start("a", [5, 6, 7])
    join.add("a", plain(0, [5]), 0, 1, now=0)
    out = join.add("a", plain(2, [7]), 0, 1, now=0)
    assert out[0] == Gap(1, 2)
    assert [item.position for item in out[1:] if isinstance(item, Placed)] == [1, 2]


def test_preempted_rows_are_dropped_and_counted():
    join = Join()
    join.start("a", [5, 6])
    join.add("a", plain(0, [5, 6]), 0, 2, now=0)
    assert join.add("a", plain(0, [5, 6]), 0, 2, now=0) == []
    assert join.counters["rows_recomputed"] == 2


def test_rows_of_a_request_that_never_starts_are_dropped_in_time():
    join = Join()
    join.add("ghost", plain(0, [1, 2]), 0, 2, now=0)
    join.tick(join_module.ORPHAN_WAIT_S)
    assert join.counters["rows_of_unknown_request"] == 0
    join.tick(join_module.ORPHAN_WAIT_S + 0.1)
    assert join.counters["rows_of_unknown_request"] == 2
    assert join.start("ghost", [1, 2]) == []


def test_orphans_and_held_rows_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(join_module, "ORPHAN_ROWS", 10)
    monkeypatch.setattr(join_module, "HELD_ROWS_PER_CHOICE", 4)
    join = Join()
    for n in range(12):
        join.add(f"ghost-{n}", plain(0, [1]), 0, 1, now=0)
    assert join.counters["rows_of_unknown_request"] == 2
    join.start("a", [1])
    for n in range(6):
        join.add("a", plain(n + 1, [2]), 0, 1, now=0)
    assert join.counters["rows_held_too_long"] == 2


def test_an_abort_without_tokens_ends_after_the_wait():
    join = Join()
    join.start("a", [5, 6])
    assert join.extend("a", [], "abort", now=10) == []
    [(_, out)] = join.tick(10 + join_module.FINISH_WAIT_S)
    assert out[0] == Gap(0, 2)
    assert out[-1] == Done("abort")
    assert join.get("a") is None


def test_negative_positions_are_rejected():
    join = Join()
    join.start("a", [5])
    assert join.add("a", Rows([-1], [5], []), 0, 1, now=0) == []
    assert join.counters["rows_rejected"] == 1
