"""Rules that end an answer: from the worker that saw the condition met to the scheduler.

The word travels with vLLM's own ModelRunnerOutput, which every executor brings to the engine core,
so it needs no hub. On a GPU it is a step or two behind the token that met the condition, and more
where the SAE lags behind the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

_STOPS = "neuroscope_stops"


class Stops:
    """A worker's half: notes, and sends them with the next output that carries tokens."""

    def __init__(self) -> None:
        self._noted: dict[str, str] = {}  # rule by internal id
        self._lock = threading.Lock()

    def note(self, internal_id: str, rule: str) -> None:
        with self._lock:
            self._noted.setdefault(internal_id, rule)

    def watch_outputs(self, runner: Any) -> None:
        """Have the outputs of `runner` carry what was noted."""
        for name in ("execute_model", "sample_tokens"):
            setattr(runner, name, self._carrying(getattr(runner, name)))

    def _carrying(self, method: Any) -> Any:
        def carrying(*args: Any, **kwargs: Any) -> Any:
            output = method(*args, **kwargs)
            if isinstance(output, AsyncModelRunnerOutput):
                get_output = output.get_output
                # vLLM calls it on another thread, when the copy to the host is done.
                output.get_output = lambda: self._attach(get_output())  # pyright: ignore[reportAttributeAccessIssue]
                return output
            return self._attach(output) if isinstance(output, ModelRunnerOutput) else output

        return carrying

    def _attach(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        with self._lock:
            if self._noted and output.req_ids:
                setattr(output, _STOPS, self._noted)
                self._noted = {}
        return output


def end(scheduler: Any, model_output: Any, outputs: dict[int, EngineCoreOutputs]) -> Iterator[str]:
    """The requests that a rule ended and that still run; their outputs say so to the client.

    Args:
        scheduler: vLLM's, which the caller has forget them.
        model_output: vLLM's ModelRunnerOutput.
        outputs: What goes to the clients after this step, by client.
    """
    for request_id, rule in getattr(model_output, _STOPS, {}).items():
        request = scheduler.requests.get(request_id)
        if request is None or request.is_finished():
            continue
        told = outputs.setdefault(request.client_index, EngineCoreOutputs())
        # An output of its own: of one that ends with "stop" vLLM takes the last token for a stop
        # token, and leaves its text out.
        stop = EngineCoreOutput(request_id, [], finish_reason=FinishReason.STOP)
        stop.stop_reason = f"neuroscope: {rule}"
        told.outputs.append(stop)
        yield request_id
