"""Changes of running requests: whose prefix-cache blocks are whose, and who is answered what."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.steering.catalogue import Catalogue, Operator, Site
from neuroscope_vllm.core.steering.settle import settle
from neuroscope_vllm.core.steering.spec import SteeringSpec
from neuroscope_vllm.engine.vllm.ids import STEERING
from neuroscope_vllm.engine.vllm.live_steering import LiveSteering, carried, carry
from neuroscope_vllm.engine.vllm.prefix_salt import salt_whole, salting

BLOCK = 16
PROMPT = list(range(5 * BLOCK))
ABLATE = msgspec.convert({"steer": [{"op": "ablate", "feature": 1}]}, SteeringSpec)
WHEN = {"feature": 2, "above": 1}
WATCH = {"when": WHEN, "tag": "seen", "name": "watch"}
SITE = Site("sae", np.ones(8, np.float32), np.ones(8, np.float32), None, None, gates=True)


def request(name: str, asked: SteeringSpec | None = None, prompt: list[int] = PROMPT) -> Request:
    init_none_hash(sha256)
    steering = settle(asked, Catalogue({20: SITE})) if asked else None
    params = SamplingParams(max_tokens=50)
    if steering is not None:
        params.extra_args = {STEERING: steering.to_dict()}
    hasher = salting(get_request_block_hasher(BLOCK, sha256), BLOCK)
    coming = SimpleNamespace(sampling_params=params, cache_salt=None)
    salt_whole(coming)
    return Request(name, prompt, params, None, block_hasher=hasher, cache_salt=coming.cache_salt)


class Core:
    """An engine core's loop, with vLLM's own requests and no model."""

    def __init__(
        self, *requests: Request, operator: Operator | None = None, store: str | None = None
    ) -> None:
        self.requests = {one.request_id: one for one in requests}
        self.hash_block_size = BLOCK
        self.answers: queue.SimpleQueue[wire.SteeringChanged] = queue.SimpleQueue()
        transfer = None if store is None else SimpleNamespace(kv_connector=store)
        config: Any = SimpleNamespace(kv_transfer_config=transfer)
        self.live = LiveSteering(config, self.answers.put, lambda name: name in self.requests)
        self.live._commands._known = Catalogue({20: SITE}, operator or Operator())

    def ask(self, name: str, asked: SteeringSpec | None) -> None:
        self.live.command(wire.encode(wire.Steer(f"c-{name}", name, asked)))

    def apply_until(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 10
        while not done(changes := self.live.apply(self)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return changes


def test_blocks_from_the_change_on_are_nobody_elses() -> None:
    mine, other = request("mine"), request("other")
    assert mine.block_hashes == other.block_hashes
    mine.num_computed_tokens = 2 * BLOCK + 3
    core = Core(mine)
    core.ask("mine", ABLATE)
    changes = core.apply_until(bool)
    answer = core.answers.get(timeout=5)
    assert (answer.position, answer.error) == (2 * BLOCK + 3, None)
    assert mine.block_hashes[:2] == other.block_hashes[:2]
    assert not set(mine.block_hashes[2:]) & set(other.block_hashes)
    assert len(mine.block_hashes) == len(other.block_hashes) == 5
    # What every worker gets.
    output = SimpleNamespace()
    carry(output, changes)
    ((name, (length, steering)),) = carried(output).items()
    assert (name, length) == ("mine", len(PROMPT))
    assert steering is not None
    assert steering.slots[0].feature == 1
    assert carried(SimpleNamespace()) == {}


def test_one_that_is_preempted_after_a_change_shares_nothing() -> None:
    """It runs its first tokens again under what was asked for later."""
    generated = msgspec.convert(
        {"steer": [{"op": "add", "feature": 1, "value": 2, "positions": "generated"}]}, SteeringSpec
    )
    for before, after in ((None, ABLATE), (ABLATE, None), (generated, None)):
        mine, alike, other = request("mine", before), request("alike", before), request("other")
        mine.append_output_token_ids(list(range(2 * BLOCK)))
        mine.num_computed_tokens = 6 * BLOCK
        core = Core(mine)
        core.ask("mine", after)
        core.apply_until(lambda changes: "mine" in changes)
        kept = list(mine.block_hashes)
        core.live.apply(core)
        assert mine.block_hashes == kept
        mine.num_computed_tokens = 0  # as vLLM's scheduler has it
        core.live.apply(core)
        theirs = {*alike.block_hashes, *other.block_hashes, *kept}
        assert len(mine.block_hashes) == len(kept) == 7
        assert not set(mine.block_hashes) & theirs
        again = list(mine.block_hashes)
        core.live.apply(core)
        assert mine.block_hashes == again


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_an_answer_is_no_prompt_of_the_next(positions: str) -> None:
    """What an answer ran under is what it would run under as part of a prompt only where all
    positions are steered alike."""
    edit = {"op": "add", "feature": 1, "value": 2, "positions": positions}
    asked = msgspec.convert({"steer": [edit]}, SteeringSpec)
    prompt, answer = PROMPT[: 2 * BLOCK], list(range(500, 500 + 3 * BLOCK))
    first = request("first", asked, prompt)
    for token in answer:
        first.append_output_token_ids(token)
    follow = request("follow", asked, [*prompt, *answer])
    plain = request("plain", None, [*prompt, *answer])
    shared = set(first.block_hashes) & set(follow.block_hashes)
    assert len(shared) == {"all": 5, "prompt": 2, "generated": 2}[positions]
    # Up to the first edited position everybody's; blocks of a steered prompt only of its kind.
    others = set(plain.block_hashes)
    assert len(set(first.block_hashes) & others) == (2 if positions == "generated" else 0)
    assert len(set(follow.block_hashes) & others) == (5 if positions == "generated" else 0)
    again = request("again", asked, prompt)
    for token in answer:
        again.append_output_token_ids(token)
    assert again.block_hashes == first.block_hashes


def test_a_salt_is_not_lost_with_a_second() -> None:
    """A prompt shorter than a block has no hash yet when the change comes."""
    asked = msgspec.convert(
        {"steer": [{"op": "add", "feature": 1, "value": 2, "positions": "generated"}]}, SteeringSpec
    )
    mine, alike = request("mine", asked, PROMPT[:5]), request("alike", None, PROMPT[:5])
    mine.num_computed_tokens = 3 * BLOCK
    core = Core(mine)
    core.ask("mine", None)
    core.apply_until(lambda changes: "mine" in changes)
    for one in (mine, alike):
        one.append_output_token_ids(list(range(5 * BLOCK)))
    assert not set(mine.block_hashes) & set(alike.block_hashes)


def test_the_operators_rules_stay() -> None:
    operator = msgspec.convert({"rules": [WATCH]}, Operator)
    core = Core(request("mine"), operator=operator)
    core.ask("mine", None)
    changes = core.apply_until(bool)
    assert changes["mine"][1]["rules"][0]["name"] == "watch"
    assert core.answers.get(timeout=5).steering["rules"][0]["name"] == "watch"  # type: ignore[index]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"steer": [{"op": "ablate", "feature": 8}]}, "steer[0].feature: 8 does not exist"),
        ({"steer": [{"op": "ablate", "feature": 1, "positions": "prompt"}]}, "positions: the"),
        ({"rules": [{**WATCH, "when": {**WHEN, "positions": "prompt"}}]}, "positions: the"),
        ({"preset": "calm"}, "preset: no preset is named calm"),
    ],
)
def test_what_can_not_be_done_is_answered(asked: dict[str, Any], why: str) -> None:
    core = Core(request("mine"))
    core.ask("mine", msgspec.convert(asked, SteeringSpec))
    answer = core.answers.get(timeout=10)
    assert answer.status == 400
    assert answer.error is not None
    assert answer.error.startswith(why)
    assert core.live.apply(core) == {}


def test_who_ended_is_answered_though_no_step_comes() -> None:
    core = Core(request("mine"))
    core.ask("gone", ABLATE)
    assert core.answers.get(timeout=10).status == 409
    core.ask("mine", ABLATE)
    deadline = time.monotonic() + 10
    while core.answers.empty():  # it ends before a step comes
        core.live.ended(["mine"])
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert core.answers.get(timeout=10).status == 409
    assert core.live.apply(core) == {}
    core.live.command(b"nonsense")
    core.ask("mine", ABLATE)
    assert "mine" in core.apply_until(bool)


def test_a_fault_is_answered_and_the_next_command_heard() -> None:
    core = Core(request("mine"))
    core.live._commands._known = None  # and there is no vLLM to make one of
    core.ask("mine", ABLATE)
    answer = core.answers.get(timeout=10)
    assert (answer.status, "AttributeError" in (answer.error or "")) == (500, True)
    core.live._commands._known = Catalogue({20: SITE})
    core.ask("mine", ABLATE)
    assert "mine" in core.apply_until(bool)


def test_where_a_kv_connector_keeps_what_blocks_were_called_nothing_is_changed() -> None:
    core = Core(request("mine"), store="OffloadingConnector")
    core.ask("mine", ABLATE)
    answer = core.answers.get(timeout=5)
    assert (answer.status, answer.position) == (409, None)
    assert "OffloadingConnector" in (answer.error or "")
    assert core.live.apply(core) == {}


def test_one_change_that_fails_takes_no_other_along() -> None:
    good, bad = request("good"), request("bad")
    core = Core(good, bad)
    bad.update_block_hashes = None  # type: ignore[assignment]
    core.ask("bad", ABLATE)
    core.ask("good", ABLATE)
    assert set(core.apply_until(bool)) == {"good"}
    answers = {one.internal_id: one for one in (core.answers.get(timeout=5) for _ in range(2))}
    assert answers["good"].error is None
    assert answers["bad"].status == 500
