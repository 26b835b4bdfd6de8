"""Pipeline stages that own different layers: a token's layers come together, in order."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core import wire
from neuroscope_vllm.engine.fake import step_features
from neuroscope_vllm.server import stages as stages_module
from neuroscope_vllm.server.join import Budget
from neuroscope_vllm.server.stages import Stages


def make_stages(limit: int = 1 << 30) -> Stages:
    return Stages(Budget(limit), Counter())


def part(step: int, layer: int, rank: int = 0, position: int = 0) -> wire.StepFeatures:
    message = step_features({"a": [(position, 5)]}, [layer], top_k=2)
    message.step, message.num_layers, message.engine = step, 2, str(rank)
    return message


def layers_of(messages: list[wire.StepFeatures]) -> list[tuple[int, list[int]]]:
    return [(one.step, sorted(layer.layer for layer in one.layers)) for one in messages]


def test_one_stage_passes_through():
    message = step_features({"a": [(0, 5)]}, [12, 20], top_k=2)
    assert make_stages().add(message, 0) == [message]


@given(st.integers(0, 1 << 30), st.integers(1, 12), st.sets(st.integers(0, 11)))
def test_steps_come_in_order_and_whole_where_both_stages_spoke(seed, steps, lost):
    order = random.Random(seed)
    first, second = list(range(steps)), [n for n in range(steps) if n not in lost]
    budget, counters = Budget(1 << 30), Counter()
    stages, out = Stages(budget, counters), []
    while first or second:
        queue, layer = order.choice([one for one in ((first, 3), (second, 20)) if one[0]])
        out += stages.add(part(queue.pop(0), layer), now=0)
    out += stages.tick(now=stages_module.WAIT_S + 1)
    assert layers_of(out) == [(n, [3] if n in lost else [3, 20]) for n in range(steps)]
    assert counters["steps_incomplete"] == len(lost & set(range(steps)))
    assert budget.rows == 0


def test_engines_do_not_mix():
    stages = make_stages()
    assert stages.add(part(0, 3, rank=0), 0) == []
    assert stages.add(part(0, 20, rank=1), 0) == []
    assert layers_of(stages.add(part(0, 20, rank=0), 0)) == [(0, [3, 20])]


def test_what_waits_is_bounded():
    stages, out = make_stages(), []
    for step in range(stages_module.WAITING_STEPS + 5):
        out += stages.add(part(step, 3), 0)
    assert layers_of(out) == [(n, [3]) for n in range(5)]


def test_what_waits_takes_a_part_of_what_rows_may():
    message = part(0, 3)
    size = wire.weight(message) + stages_module.OVERHEAD_BYTES
    budget, counters = Budget(int(10 * size / stages_module.WAITING_SHARE)), Counter()
    stages, out = Stages(budget, counters), []
    for step in range(30):
        out += stages.add(part(step, 3, rank=step % 3), 0)
        assert budget.rows <= 10 * size
    assert 0 < len(out) < 30
    assert counters["steps_incomplete"] == len(out)
    stages.tick(stages_module.WAIT_S + 1)
    assert budget.rows == 0


def test_stages_that_disagree_are_an_error():
    stages = make_stages()
    stages.add(part(0, 3), 0)
    with pytest.raises(ValueError, match="disagree about the rows of step 0"):
        stages.add(part(0, 20, position=1), 0)


def test_a_stage_that_speaks_twice_is_an_error():
    stages = make_stages()
    assert not stages.add(part(1, 4), 0.0)
    with pytest.raises(ValueError, match="2 of 2 layers, 1 of them"):
        stages.add(part(1, 4), 0.0)
    assert layers_of(stages.add(part(1, 9), 0.0)) == [(1, [4, 9])]


def test_no_model_has_so_many_layers():
    many = part(1, 4)
    many.num_layers = 1_000_000
    with pytest.raises(ValueError, match="1 of 1000000 layers"):
        make_stages().add(many, 0.0)
