"""The truth about tokens: what the scheduler admitted, accepted and ended.

Runs in the engine-core process. The scheduler alone knows which sampled tokens stand after
stops, rejected drafts, preemption and asynchronous overrun; workers do not.
"""

from __future__ import annotations

import atexit
import os
import re
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.config import VllmConfig

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.sender import Sender
from neuroscope_vllm.engine.vllm.settings import worker_settings

_CHILD = re.compile(r"^(\d+)_")
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


class SchedulerTap:
    """Publishes RequestStarted and TokensSampled for one engine core."""

    def __init__(self, scheduler: Any, vllm_config: VllmConfig, endpoint: str, model: str) -> None:
        self._dp_rank = vllm_config.parallel_config.data_parallel_rank
        self._live: dict[str, wire.Live] = {}
        # Requests start on vLLM's input thread, tokens come on its loop, a resync on the sender's.
        self._lock = threading.Lock()
        sender = f"scheduler-{self._dp_rank}-{os.getpid()}"
        self._sender = Sender(
            endpoint,
            lambda counters: wire.Hello(
                sender, "scheduler", self._dp_rank, model, counters=counters
            ),
            self._resync,
        )
        self._sender.start()
        atexit.register(self._sender.close)
        self._wrap(scheduler)

    def started(self, request: Any) -> None:
        """`request`: vLLM's EngineCoreRequest, before the scheduler sees it."""
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None:
            return  # pooling, or embeddings in place of tokens: nothing to align with
        external = request.external_req_id or _SUFFIX.sub("", request.request_id)
        started = wire.RequestStarted(
            internal_id=request.request_id,
            request_id=external,
            choice=choice_of(request.request_id, external),
            dp_rank=self._dp_rank,
            prompt_token_ids=np.asarray(request.prompt_token_ids, "<i4").tobytes(),
            created=request.arrival_time,
            stop=[params.stop] if isinstance(params.stop, str) else list(params.stop or []),
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            lora=request.lora_request.lora_name if request.lora_request else None,
        )
        with self._lock:
            self._live[started.internal_id] = wire.Live(started, [])
            self._sender.put(started)

    def _wrap(self, scheduler: Any) -> None:
        update_from_output = scheduler.update_from_output
        finish_requests = scheduler.finish_requests

        def update_and_report(*args: Any, **kwargs: Any) -> Any:
            outputs = update_from_output(*args, **kwargs)
            self._accepted(output for client in outputs.values() for output in client.outputs)
            return outputs

        def finish_and_report(request_ids: Any, finished_status: Any, *args: Any) -> Any:
            if request_ids is None:
                ended = list(self._live)
            else:
                ended = [request_ids] if isinstance(request_ids, str) else list(request_ids)
                request_ids = ended
            result = finish_requests(request_ids, finished_status, *args)
            reason = finished_status.name.removeprefix("FINISHED_").lower()
            self._report(
                [
                    wire.Sampled(internal_id, [], finish_reason=_REASONS.get(reason, reason))
                    for internal_id in ended
                    if internal_id in self._live
                ]
            )
            return result

        scheduler.update_from_output = update_and_report
        scheduler.finish_requests = finish_and_report

    def _accepted(self, outputs: Iterable[Any]) -> None:
        live = self._live
        self._report(
            [
                wire.Sampled(
                    output.request_id,
                    output.new_token_ids,
                    None if output.finish_reason is None else str(output.finish_reason),
                    output.stop_reason,
                )
                for output in outputs
                if output.request_id in live
            ]
        )

    def _report(self, sampled: list[wire.Sampled]) -> None:
        if not sampled:
            return
        with self._lock:
            for one in sampled:
                token_ids = self._live[one.internal_id].token_ids
                one.at = len(token_ids)
                token_ids.extend(one.token_ids)
                if one.finish_reason:
                    del self._live[one.internal_id]
            self._sender.put(wire.TokensSampled(self._dp_rank, sampled))

    def _resync(self) -> None:
        """Everything that runs, in order with what was put before and after."""
        with self._lock:
            live = [wire.Live(one.started, list(one.token_ids)) for one in self._live.values()]
            self._sender.put(wire.Resync(self._dp_rank, live))


_REASONS = {"stopped": "stop", "length_capped": "length", "aborted": "abort"}


def attach(scheduler: Any, vllm_config: VllmConfig) -> None:
    """Give a freshly built scheduler its tap, if neuroscope is configured."""
    settings = worker_settings(vllm_config)
    if settings is not None:
        scheduler.neuroscope_tap = SchedulerTap(
            scheduler, vllm_config, settings.endpoint, settings.model
        )


def choice_of(internal_id: str, external_id: str) -> int:
    """Under n > 1 vLLM puts `<i>_` in front of the id of choice i."""
    child = _CHILD.match(internal_id)
    is_child = child is not None and internal_id[child.end() :].startswith(external_id)
    return int(child.group(1)) if child is not None and is_child else 0
