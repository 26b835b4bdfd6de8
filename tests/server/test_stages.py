"""Pipeline stages that own different layers: a token's layers come together, in order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core import wire
from neuroscope_vllm.engine.fake import step_features
from neuroscope_vllm.server import stages as stages_module
from neuroscope_vllm.server.stages import Stages


def part(step: int, layer: int, rank: int = 0, position: int = 0) -> wire.StepFeatures:
    message = step_features({"a": [(position, 5)]}, [layer], top_k=2)
    message.step, message.num_layers, message.engine = step, 2, str(rank)
    return message


def layers_of(messages: list[wire.StepFeatures]) -> list[tuple[int, list[int]]]:
    return [(one.step, sorted(layer.layer for layer in one.layers)) for one in messages]


def test_one_stage_passes_through():
    message = step_features({"a": [(0, 5)]}, [12, 20], top_k=2)
    assert Stages().add(message, 0) == [message]


@given(st.integers(0, 1 << 30), st.integers(1, 12), st.sets(st.integers(0, 11)))
def test_steps_come_in_order_and_whole_where_both_stages_spoke(seed, steps, lost):
    order = random.Random(seed)
    first, second = list(range(steps)), [n for n in range(steps) if n not in lost]
    stages, out = Stages(), []
    while first or second:
        queue, layer = order.choice([one for one in ((first, 3), (second, 20)) if one[0]])
        out += stages.add(part(queue.pop(0), layer), now=0)
    out += stages.tick(now=stages_module.WAIT_S + 1)
    assert layers_of(out) == [(n, [3] if n in lost else [3, 20]) for n in range(steps)]


def test_engines_do_not_mix():
    stages = Stages()
    assert stages.add(part(0, 3, rank=0), 0) == []
    assert stages.add(part(0, 20, rank=1), 0) == []
    assert layers_of(stages.add(part(0, 20, rank=0), 0)) == [(0, [3, 20])]


def test_what_waits_is_bounded():
    stages, out = Stages(), []
    for step in range(stages_module.WAITING_STEPS + 5):
        out += stages.add(part(step, 3), 0)
    assert layers_of(out) == [(n, [3]) for n in range(5)]


def test_stages_that_disagree_are_an_error():
    stages = Stages()
    stages.add(part(0, 3), 0)
    with pytest.raises(ValueError, match="disagree about the rows of step 0"):
        stages.add(part(0, 20, position=1), 0)
