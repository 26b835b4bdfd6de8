"""Running requests that are steered otherwise, at the hub's command.

A command is settled on a thread of its own, as admission settles what a request brings. It is
applied between two steps, by the engine's loop: the scheduler's output takes the change to every
worker, so all ranks and stages make it before the same forward pass.
"""

from __future__ import annotations

import logging
import queue
import threading
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.config import VllmConfig

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.request import KEY
from neuroscope_vllm.core.steering.catalogue import Catalogue
from neuroscope_vllm.core.steering.settle import Refused, settle
from neuroscope_vllm.core.steering.settled import Steering, from_dict
from neuroscope_vllm.engine.vllm import steer_catalogue
from neuroscope_vllm.engine.vllm.prefix_salt import salt_from

logger = logging.getLogger(__name__)

_CHANGES = "neuroscope_steering"


class _Change(NamedTuple):
    command: str
    internal_id: str
    steering: Steering | None


class LiveSteering:
    """The engine core's half."""

    def __init__(
        self, vllm_config: VllmConfig, answer: Callable[[wire.SteeringChanged], object]
    ) -> None:
        """`answer` is called on several threads."""
        self._vllm_config = vllm_config
        self._answer = answer
        self._catalogue: Catalogue | None = None
        self._commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Change] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def command(self, data: bytes) -> None:
        """A `wire.Steer` came."""
        self._commands.put(data)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._settle_all, name="neuroscope-steer", daemon=True
            )
            self._thread.start()

    def apply(self, scheduler: Any) -> dict[str, Any]:
        """Before a step is scheduled, on the engine's loop: the changes that its workers make, by
        internal id: (length of the prompt, settled steering or None)."""
        changes: dict[str, Any] = {}
        while not self._ready.empty():
            change = self._ready.get()
            request = scheduler.requests.get(change.internal_id)
            if request is None or request.is_finished():
                self._refuse(change, 409, "the request has ended, so nothing is left to steer.")
                continue
            # Drafts that are in flight may run again, in this step.
            position = max(request.num_computed_tokens - len(request.spec_token_ids), 0)
            salt = uuid.uuid4().hex
            salt_from(request, position, salt)
            _hash_again(request, position, scheduler.hash_block_size)
            steering = change.steering
            changes[change.internal_id] = (
                request.num_prompt_tokens,
                steering.to_dict() if steering else None,
            )
            self._answer(
                wire.SteeringChanged(
                    change.command,
                    change.internal_id,
                    position=position,
                    salt=salt.encode(),
                    steering=steering.describe() if steering else None,
                )
            )
        return changes

    def _settle_all(self) -> None:
        while True:
            data = self._commands.get()
            try:
                self._settle(wire.decode_command(data))
            except Exception:  # one command must not end the listening
                logger.exception("neuroscope: a command of the hub can not be carried out")

    def _settle(self, command: wire.Steer) -> None:
        change = _Change(command.command, command.internal_id, None)
        if command.asked is not None:
            try:
                if self._catalogue is None:
                    self._catalogue = steer_catalogue.build_again(self._vllm_config)
                change = change._replace(steering=settle(command.asked, self._catalogue))
            except Refused as refusal:
                self._refuse(change, 400, f"{KEY}.{refusal}")
                return
        self._ready.put(change)

    def _refuse(self, change: _Change, status: int, error: str) -> None:
        self._answer(
            wire.SteeringChanged(change.command, change.internal_id, error=error, status=status)
        )


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
