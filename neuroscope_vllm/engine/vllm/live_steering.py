"""Running requests that are steered otherwise, at the hub's command.

It is applied between two steps, by the engine's loop: the scheduler's output takes the change to
every worker, so all ranks and stages make it before the same forward pass.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.steering.settled import Steering, from_dict
from neuroscope_vllm.engine.serving.steer_commands import ENDED, Change, SteerCommands
from neuroscope_vllm.engine.vllm import steer_catalogue
from neuroscope_vllm.engine.vllm.prefix_salt import salt_from

_CHANGES = "neuroscope_steering"
APPENDING = ("OffloadingConnector",)
"""KV connectors that copy a request's block hashes when they are made, and never look again."""


class LiveSteering:
    """The engine core's half."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        answer: Callable[[wire.SteeringChanged], object],
        runs: Callable[[str], bool],
    ) -> None:
        """`answer`, and `runs` of an internal id, are called on several threads."""
        self._answer = answer
        store, refusal = steer_catalogue.connector(vllm_config), None
        if store in APPENDING:
            refusal = (
                f"{store} has taken note of this request's blocks as they were; give the steering"
                " with the request, or serve without --kv-transfer-config."
            )
        self._commands = SteerCommands(
            lambda: steer_catalogue.build_again(vllm_config), answer, runs, refusal
        )
        self.command = self._commands.command
        self.ended = self._commands.ended
        self._changed: dict[str, Any] = {}  # vLLM's Requests, by internal id

    def apply(self, scheduler: Any) -> dict[str, Any]:
        """Before a step is scheduled, on the engine's loop: the changes that its workers make, by
        internal id: (length of the prompt, settled steering or None)."""
        changes: dict[str, Any] = {}
        self._guard_preempted(scheduler)
        for change in self._commands.take():
            request = scheduler.requests.get(change.internal_id)
            if request is None or request.is_finished():
                self._commands.refuse(change, 409, ENDED)
                continue
            try:
                answer = self._change(change, request, scheduler.hash_block_size)
            except Exception as error:
                self._commands.failed(change, error)
                continue
            changes[change.internal_id] = (
                request.num_prompt_tokens,
                change.steering.to_dict() if change.steering else None,
            )
            self._answer(answer)
        return changes

    def _change(self, change: Change, request: Any, block_size: int) -> wire.SteeringChanged:
        """Have its blocks be nobody else's from where the change holds."""
        # Drafts that are in flight may run again, in this step.
        position = max(request.num_computed_tokens - len(request.spec_token_ids), 0)
        salt = uuid.uuid4().hex
        salt_from(request, position, salt)
        _hash_again(request, position, block_size)
        self._changed[change.internal_id] = request
        return wire.SteeringChanged(
            change.command,
            change.internal_id,
            position=position,
            salt=salt.encode(),
            steering=change.steering.describe() if change.steering else None,
        )

    def _guard_preempted(self, scheduler: Any) -> None:
        """One that was changed and is preempted runs its first tokens again under the steering of
        now, so its blocks are nobody else's from the first on."""
        for internal_id, request in list(self._changed.items()):
            if request.is_finished():
                del self._changed[internal_id]
            elif request.num_computed_tokens == 0:
                del self._changed[internal_id]
                salt_from(request, 0, uuid.uuid4().hex)
                _hash_again(request, 0, scheduler.hash_block_size)


def carry(scheduler_output: Any, changes: dict[str, Any]) -> None:
    """Have vLLM's SchedulerOutput take the changes along."""
    if changes:
        setattr(scheduler_output, _CHANGES, changes)


def carried(scheduler_output: Any) -> dict[str, tuple[int, Steering | None]]:
    """In a worker: what came along."""
    return {
        internal_id: (prompt_length, None if given is None else from_dict(given))
        for internal_id, (prompt_length, given) in getattr(scheduler_output, _CHANGES, {}).items()
    }


def _hash_again(request: Any, position: int, block_size: int) -> None:
    """Blocks that are not computed yet were hashed when the request came."""
    del request.block_hashes[position // block_size :]
    request.update_block_hashes()
