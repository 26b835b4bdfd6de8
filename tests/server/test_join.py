"""The join against a simulated engine: whatever it does, each position comes out once, in order,
with the token that stands and the features of exactly that context."""

from __future__ import annotations

import random
import zlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from neuroscope_vllm.server import join as join_module
from neuroscope_vllm.server.join import Budget, Done, Gap, Item, Join, Placed
from neuroscope_vllm.server.prefix import BLOCK, PrefixCache
from neuroscope_vllm.server.rows import Row, Rows

Step = tuple[int, list[int]]
"""First position and input tokens of a span."""


def fingerprint(context: list[int]) -> int:
    """Stands for a row's features: they depend on all tokens up to its own and on nothing else."""
    return zlib.crc32(bytes(context)) >> 1


def make_rows(first: int, tokens: list[int], prints: list[int]) -> Rows:
    layer = [Row(20, [p], [float(p % 1000)], [float(p % 1000)], p, 0) for p in prints]
    return Rows(list(range(first, first + len(tokens))), tokens, [layer])


def rows_of(step: Step, context: list[int]) -> Rows:
    first, tokens = step
    seen = [context[:first] + tokens[: n + 1] for n in range(len(tokens))]
    return make_rows(first, tokens, [fingerprint(one) for one in seen])


def new_join() -> Join:
    return Join(PrefixCache(1 << 20), Budget(1 << 30), Counter())


def start(join: Join, name: str, prompt: list[int], cached: int = 0) -> list[Item]:
    return join.start(name, prompt, b"root") + join.scheduled(name, cached)


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

    def play(self, join: Join, worker: list[Rows], name: str = "a") -> list[Item]:
        """Both senders' messages, each in its own order, interleaved at random."""
        out: list[Item] = []
        truth: list[tuple[list[int], str | None] | str] = ["start", "scheduled", *self.scheduler]
        pending = list(worker)
        while truth or pending:
            if truth and (not pending or self.random.random() < 0.5):
                message = truth.pop(0)
                if message == "start":
                    out += join.start(name, self.prompt, b"root")
                elif message == "scheduled":
                    out += join.scheduled(name, self.cached)
                elif join.get(name) is not None:
                    assert not isinstance(message, str)
                    out += join.extend(name, *message, now=0.0)
            else:
                rows = pending.pop(0)
                out += join.add(name, rows, 0, len(rows.positions), now=0.0)
        return out


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=40)


def check(engine: Engine, out: list[Item], lost: bool) -> None:
    placed = [item for item in out if isinstance(item, Placed)]
    assert [(p.position, p.token_id) for p in placed] == list(enumerate(engine.ids))
    assert isinstance(out[-1], Done)
    assert sum(isinstance(item, Done) for item in out) == 1
    gaps = {at for gap in out if isinstance(gap, Gap) for at in range(gap.start, gap.stop)}
    for p in placed:
        if p.rows is not None:
            assert p.rows.layers[0][p.row].l0 == fingerprint(engine.ids[: p.position + 1])
            assert p.rows.layers[0][p.row].index == [fingerprint(engine.ids[: p.position + 1])]
            assert p.position not in gaps
        elif not p.cached:
            assert p.position in gaps or p.position == len(engine.ids) - 1
    assert placed[-1].rows is None
    if not lost:
        assert not gaps
        assert [p.position for p in placed if p.cached] == list(range(engine.cached))


@settings(max_examples=400)
@given(st.integers(0, 1 << 30), tokens, tokens)
def test_every_position_once_in_order_with_its_own_features(seed, prompt, output):
    engine = Engine(seed, prompt, output)
    check(engine, engine.play(new_join(), engine.worker), lost=False)


@settings(max_examples=400)
@given(st.integers(0, 1 << 30), tokens, tokens)
def test_lost_messages_become_gaps_never_silence(seed, prompt, output):
    engine = Engine(seed, prompt, output)
    kept = [rows for rows in engine.worker if engine.random.random() < 0.7]
    join = new_join()
    out = engine.play(join, kept)
    if join.get("a") is not None:
        assert not any(isinstance(item, Done) for item in out)
        assert join.tick(join_module.FINISH_WAIT_S - 0.01) == []
        [(_, rest)] = join.tick(join_module.FINISH_WAIT_S)
        out += rest
    check(engine, out, lost=True)


def plain(first: int, tokens: list[int]) -> Rows:
    return make_rows(first, tokens, tokens)


def test_rejected_drafts_are_counted_and_dropped():
    join = new_join()
    start(join, "a", [5])
    join.add("a", plain(0, [5]), 0, 1, now=0)
    join.extend("a", [6], None, now=0)
    out = join.add("a", plain(1, [6, 7, 8]), 0, 3, now=0)
    assert [p.position for p in out if isinstance(p, Placed)] == [1]
    out = join.extend("a", [9], None, now=0)
    assert out == []
    assert join.counters["rows_rejected"] == 2


def test_a_matching_row_after_a_rejected_one_is_not_trusted():
    join = new_join()
    start(join, "a", [5])
    join.extend("a", [6, 9, 8], None, now=0)
    out = join.add("a", plain(0, [5, 6, 7, 8]), 0, 4, now=0)
    assert [p.position for p in out if isinstance(p, Placed)] == [0, 1]


def test_cached_positions_come_first_and_say_so():
    join = new_join()
    start(join, "a", [5, 6, 7], cached=2)
    out = join.add("a", plain(2, [7]), 0, 1, now=0)
    assert [(p.position, p.cached) for p in out if isinstance(p, Placed)] == [
        (0, True),
        (1, True),
        (2, False),
    ]


def test_prompt_rows_that_did_not_come_are_lost_not_cached():
    join = new_join()
    start(join, "a", [5, 6, 7], cached=1)
    out = join.add("a", plain(2, [7]), 0, 1, now=0)
    assert [item if isinstance(item, Gap) else item[0] for item in out] == [0, Gap(1, 2), 1, 2]


def test_rows_wait_until_it_is_known_what_was_cached():
    join = new_join()
    join.start("a", [5, 6], b"")
    assert join.add("a", plain(1, [6]), 0, 1, now=0) == []
    out = join.scheduled("a", 1)
    assert [(p.position, p.cached) for p in out if isinstance(p, Placed)] == [(0, True), (1, False)]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 1 << 30), tokens, tokens), min_size=2, max_size=6))
def test_cached_positions_have_the_features_of_their_own_prefix(requests):
    """Requests that share prefixes: what the cache fills in is what the request would compute,
    and it fills in exactly the blocks that some request before has computed."""
    join, known = new_join(), set()
    for number, (seed, prompt, output) in enumerate(requests):
        engine = Engine(seed, prompt, output)
        out = engine.play(join, engine.worker, f"r{number}")
        check(engine, out, lost=False)
        for p in (item for item in out if isinstance(item, Placed)):
            end = (p.position // BLOCK + 1) * BLOCK
            if p.cached:
                filled = end <= engine.cached and tuple(engine.ids[:end]) in known
                assert (p.rows is not None) == filled
        for end in range(BLOCK, len(engine.ids), BLOCK):
            if end - BLOCK >= engine.cached:
                known.add(tuple(engine.ids[:end]))


def test_requests_of_other_roots_share_nothing():
    join, prompt = new_join(), list(range(BLOCK + 1))
    join.start("a", prompt, b"one")
    join.scheduled("a", 0)
    join.add("a", plain(0, prompt), 0, len(prompt), now=0)
    for name, root, filled in (("b", b"other", False), ("c", b"one", True)):
        join.start(name, prompt, root)
        join.scheduled(name, BLOCK)
        out = join.add(name, plain(BLOCK, prompt[BLOCK:]), 0, 1, now=0)
        assert [p.rows is not None for p in out if isinstance(p, Placed)][:BLOCK] == [
            filled
        ] * BLOCK


def test_the_prefix_cache_is_bounded_and_forgets_what_was_not_asked_for():
    cache = PrefixCache(20_000)
    join = Join(cache, Budget(1 << 30), Counter())
    for number in range(40):
        prompt = [number, *range(BLOCK)]
        start(join, str(number), prompt)
        join.add(str(number), plain(0, prompt), 0, len(prompt), now=0)
        assert cache.bytes <= 20_000
        start(join, f"again {number}", [0, *range(BLOCK)], cached=BLOCK)
        [*again] = join.add(f"again {number}", plain(BLOCK, [BLOCK - 1]), 0, 1, now=0)
        assert again[0].rows is not None
    assert 2 < len(cache) < 40
    assert cache.misses == 0


def test_a_hole_in_the_middle_is_a_gap():
    join = new_join()
    start(join, "a", [5, 6, 7])
    join.add("a", plain(0, [5]), 0, 1, now=0)
    out = join.add("a", plain(2, [7]), 0, 1, now=0)
    assert out[0] == Gap(1, 2)
    assert [item.position for item in out[1:] if isinstance(item, Placed)] == [1, 2]


def test_preempted_rows_are_dropped_and_counted():
    join = new_join()
    start(join, "a", [5, 6])
    join.add("a", plain(0, [5, 6]), 0, 2, now=0)
    assert join.add("a", plain(0, [5, 6]), 0, 2, now=0) == []
    assert join.counters["rows_recomputed"] == 2


def test_rows_of_a_request_that_never_starts_are_dropped_in_time():
    join = new_join()
    join.add("ghost", plain(0, [1, 2]), 0, 2, now=0)
    join.tick(join_module.ORPHAN_WAIT_S)
    assert join.counters["rows_of_unknown_request"] == 0
    join.tick(join_module.ORPHAN_WAIT_S + 0.1)
    assert join.counters["rows_of_unknown_request"] == 2
    assert start(join, "ghost", [1, 2]) == []


def test_orphans_and_held_rows_are_bounded():
    row = plain(0, [1]).bytes
    budget = Budget(10 * row)
    join = Join(PrefixCache(1 << 20), budget, Counter())
    for n in range(12):
        join.add(f"ghost-{n}", plain(0, [1]), 0, 1, now=0)
    assert join.counters["rows_of_unknown_request"] == 12 - 5  # half of what may wait
    start(join, "a", [1])
    for n in range(6):
        join.add("a", plain(n + 1, [2]), 0, 1, now=0)
    assert join.counters["rows_held_too_long"] == 1
    join.extend("a", [2] * 7, "length", now=0)
    join.tick(join_module.ORPHAN_WAIT_S + 0.1)
    assert budget.rows == 0


def test_a_row_that_waits_keeps_no_others():
    """A step may have thousands, of which one waits."""
    budget = Budget(1 << 30)
    join = Join(PrefixCache(1 << 20), budget, Counter())
    join.add("ghost", plain(0, [1] * 8192), 7, 8, now=0)
    assert budget.rows == plain(0, [1]).bytes


def test_positions_that_never_ran_are_no_gap():
    join = new_join()
    start(join, "a", [5, 6, 7])
    assert join.extend("a", [], "abort", now=10, computed_tokens=2) == []
    out = join.add("a", plain(0, [5, 6]), 0, 2, now=10)
    assert [item.position for item in out if isinstance(item, Placed)] == [0, 1, 2]
    assert out[-1] == Done("abort")
    assert join.get("a") is None


def test_an_abort_before_it_was_scheduled_ends_at_once():
    join = new_join()
    join.start("a", [5, 6], b"")
    out = join.extend("a", [], "abort", now=10, computed_tokens=0)
    assert [type(item) for item in out] == [Placed, Placed, Done]


def test_an_abort_whose_rows_do_not_come_ends_after_the_wait():
    join = new_join()
    start(join, "a", [5, 6])
    assert join.extend("a", [], "abort", now=10) == []
    [(_, out)] = join.tick(10 + join_module.FINISH_WAIT_S)
    assert out[0] == Gap(0, 2)
    assert out[-1] == Done("abort")
    assert join.get("a") is None


def test_negative_positions_are_rejected():
    join = new_join()
    start(join, "a", [5])
    assert join.add("a", make_rows(-1, [5], [5]), 0, 1, now=0) == []
    assert join.counters["rows_rejected"] == 1
