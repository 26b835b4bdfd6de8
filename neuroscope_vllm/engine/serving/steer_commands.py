"""Commands of the hub to steer running requests otherwise: settled on a thread of their own, taken
by the engine between two steps."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.errors import NeuroscopeError
from neuroscope_vllm.core.steering.catalogue import Catalogue
from neuroscope_vllm.core.steering.settle import SteeringRefused, settle
from neuroscope_vllm.core.steering.settled import Steering
from neuroscope_vllm.core.steering.spec import SteeringSpec

logger = logging.getLogger(__name__)

ENDED = "the request has ended, so nothing is left to steer."


class Change(NamedTuple):
    """A command that was settled."""

    command: str
    internal_id: str
    steering: Steering | None


class SteerCommands:
    """From `command` to `take`; what can not be done is answered here."""

    def __init__(
        self,
        catalogue: Callable[[], Catalogue],
        answer: Callable[[wire.SteeringChanged], object],
        runs: Callable[[str], bool],
        refusal: str | None = None,
    ) -> None:
        """
        Args:
            catalogue: Called once, when the first command comes.
            answer, runs: Of an internal id; called on several threads.
            refusal: Why this engine can change nothing.
        """
        self._catalogue = catalogue
        self._known: Catalogue | None = None
        self._answer = answer
        self._runs = runs
        self._refusal = refusal
        self._commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._ready: dict[str, Change] = {}  # by command, in order
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def command(self, data: bytes) -> None:
        """A `wire.Steer` came."""
        self._commands.put(data)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._settle_all, name="neuroscope-steer", daemon=True
            )
            self._thread.start()

    def take(self, wanted: Callable[[Change], bool] = lambda change: True) -> list[Change]:
        """What is to be changed now."""
        with self._lock:
            taken = [change for change in self._ready.values() if wanted(change)]
            for change in taken:
                del self._ready[change.command]
        return taken

    def ended(self, internal_ids: Collection[str]) -> None:
        """These requests have, and changes that are not made yet come too late."""
        if self._ready:
            for change in self.take(lambda change: change.internal_id in internal_ids):
                self.refuse(change, 409, ENDED)

    def refuse(self, change: Change, status: int, error: str) -> None:
        self._answer(
            wire.SteeringChanged(change.command, change.internal_id, error=error, status=status)
        )

    def failed(self, change: Change, error: Exception) -> None:
        """A fault of ours: who asked is told."""
        logger.error("neuroscope: steering could not be changed", exc_info=error)
        self.refuse(change, 500, f"the engine failed on it ({error!r}); its log has the trace.")

    def _settle_all(self) -> None:
        while True:
            try:
                command = wire.decode_command(self._commands.get())
            except (msgspec.MsgspecError, ValueError) as error:
                logger.warning("neuroscope: a malformed command from the hub: %s", error)
                continue
            self._settle(command)

    def _settle(self, command: wire.Steer) -> None:
        change = Change(command.command, command.internal_id, None)
        if self._refusal is not None:
            self.refuse(change, 409, self._refusal)
            return
        try:
            if self._known is None:
                self._known = self._catalogue()
            # Without edits the operator's rules are still everybody's.
            steering = settle(command.asked or SteeringSpec(), self._known)
            _check_in_time(command.asked, self._known)
        except SteeringRefused as refusal:
            self.refuse(change, 400, str(refusal))
            return
        except (NeuroscopeError, OSError) as error:  # a file is not what it was at the start
            self.refuse(change, 503, str(error))
            return
        except Exception as error:
            self.failed(change, error)  # and those after it are still heard
            return
        with self._lock:
            self._ready[change.command] = change._replace(steering=steering)
        # If it ended meanwhile, no step comes that would find the change.
        if not self._runs(change.internal_id):
            self.ended([change.internal_id])


def _check_in_time(asked: SteeringSpec | None, catalogue: Catalogue) -> None:
    """Raises SteeringRefused if a request's own edits or conditions are of its prompt."""
    rest = msgspec.structs.replace(catalogue.operator, rules=[])
    own = settle(asked or SteeringSpec(), msgspec.structs.replace(catalogue, operator=rest))
    if own is not None and any(slot.positions == "prompt" for slot in own.slots):
        raise SteeringRefused(
            "positions: the prompt of a running request has run; use generated or all."
        )
