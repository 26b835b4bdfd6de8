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
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import msgspec
from vllm.config import VllmConfig

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.errors import NeuroscopeError
from neuroscope_vllm.core.steering.catalogue import Catalogue
from neuroscope_vllm.core.steering.settle import SteeringRefused, settle
from neuroscope_vllm.core.steering.settled import Steering, from_dict
from neuroscope_vllm.core.steering.spec import SteeringSpec
from neuroscope_vllm.engine.vllm import steer_catalogue
from neuroscope_vllm.engine.vllm.prefix_salt import salt_from

logger = logging.getLogger(__name__)

ENDED = "the request has ended, so nothing is left to steer."
_CHANGES = "neuroscope_steering"
APPENDING = ("OffloadingConnector",)
"""KV connectors that copy a request's block hashes when they are made, and never look again."""


class _Change(NamedTuple):
    command: str
    internal_id: str
    steering: Steering | None


class LiveSteering:
    """The engine core's half."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        answer: Callable[[wire.SteeringChanged], object],
        runs: Callable[[str], bool],
    ) -> None:
        """`answer`, and `runs` of an internal id, are called on several threads."""
        self._vllm_config = vllm_config
        self._answer = answer
        self._runs = runs
        self._catalogue: Catalogue | None = None
        self._commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._ready: dict[str, _Change] = {}  # by command, in order
        self._lock = threading.Lock()
        self._changed: dict[str, Any] = {}  # vLLM's Requests, by internal id
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
        self._guard_preempted(scheduler)
        for change in self._take(lambda change: True):
            request = scheduler.requests.get(change.internal_id)
            if request is None or request.is_finished():
                self._refuse(change, 409, ENDED)
                continue
            try:
                answer = self._change(change, request, scheduler.hash_block_size)
            except Exception as error:
                logger.exception("neuroscope: steering could not be changed")
                self._refuse(change, 500, _fault(error))
                continue
            changes[change.internal_id] = (
                request.num_prompt_tokens,
                change.steering.to_dict() if change.steering else None,
            )
            self._answer(answer)
        return changes

    def _change(self, change: _Change, request: Any, block_size: int) -> wire.SteeringChanged:
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

    def ended(self, internal_ids: Collection[str]) -> None:
        """These requests have, and changes that are not made yet come too late."""
        if self._ready:
            for change in self._take(lambda change: change.internal_id in internal_ids):
                self._refuse(change, 409, ENDED)

    def _take(self, wanted: Callable[[_Change], bool]) -> list[_Change]:
        with self._lock:
            taken = [change for change in self._ready.values() if wanted(change)]
            for change in taken:
                del self._ready[change.command]
        return taken

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

    def _settle_all(self) -> None:
        while True:
            try:
                command = wire.decode_command(self._commands.get())
            except (msgspec.MsgspecError, ValueError) as error:
                logger.warning("neuroscope: a malformed command from the hub: %s", error)
                continue
            self._settle(command)

    def _settle(self, command: wire.Steer) -> None:
        change = _Change(command.command, command.internal_id, None)
        store = steer_catalogue.connector(self._vllm_config)
        if store in APPENDING:
            self._refuse(
                change,
                409,
                f"{store} has taken note of this request's blocks as they were; give the steering"
                " with the request, or serve without --kv-transfer-config.",
            )
            return
        try:
            if self._catalogue is None:
                self._catalogue = steer_catalogue.build_again(self._vllm_config)
            # Without edits the operator's rules are still everybody's.
            steering = settle(command.asked or SteeringSpec(), self._catalogue)
            _check_in_time(command.asked, self._catalogue)
        except SteeringRefused as refusal:
            self._refuse(change, 400, str(refusal))
            return
        except (NeuroscopeError, OSError) as error:  # a file is not what it was at the start
            self._refuse(change, 503, str(error))
            return
        except Exception as error:
            # A fault of ours: who asked is told, and those after it are still heard.
            logger.exception("neuroscope: steering could not be changed")
            self._refuse(change, 500, _fault(error))
            return
        with self._lock:
            self._ready[change.command] = change._replace(steering=steering)
        # If it ended meanwhile, no step comes that would find the change.
        if not self._runs(change.internal_id):
            self.ended([change.internal_id])

    def _refuse(self, change: _Change, status: int, error: str) -> None:
        self._answer(
            wire.SteeringChanged(change.command, change.internal_id, error=error, status=status)
        )


def _fault(error: Exception) -> str:
    return f"the engine failed on it ({error!r}); its log has the trace."


def _check_in_time(asked: SteeringSpec | None, catalogue: Catalogue) -> None:
    """Raises SteeringRefused if a request's own edits or conditions are of its prompt."""
    rest = msgspec.structs.replace(catalogue.operator, rules=[])
    own = settle(asked or SteeringSpec(), msgspec.structs.replace(catalogue, operator=rest))
    if own is not None and any(slot.positions == "prompt" for slot in own.slots):
        raise SteeringRefused(
            "positions: the prompt of a running request has run; use generated or all."
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
