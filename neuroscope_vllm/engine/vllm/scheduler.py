"""The truth about tokens: what the scheduler admitted, accepted and ended.

Runs in the engine-core process. The scheduler alone knows which sampled tokens stand after
stops, rejected drafts, preemption and asynchronous overrun; workers do not.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.request import RequestStatus

from neuroscope_vllm.core import wire
from neuroscope_vllm.engine.serving.requests import RequestLog, prompt_tokens
from neuroscope_vllm.engine.vllm import live_steering, rule_stops
from neuroscope_vllm.engine.vllm.ids import identify, secret_of
from neuroscope_vllm.engine.vllm.live_steering import LiveSteering
from neuroscope_vllm.engine.vllm.prefix_salt import salt_of, steering_of
from neuroscope_vllm.engine.vllm.settings import (
    WorkerSettings,
    engine_name,
    engine_rank,
    worker_settings,
)

R = TypeVar("R")

logger = logging.getLogger(__name__)


def _guarded(report: Callable[..., R]) -> Callable[..., R | None]:
    """For methods of the tap. vLLM goes on whatever happens in `report`: it is logged and counted,
    and a resync tells the hub what it missed."""

    @functools.wraps(report)
    def guarded(tap: SchedulerTap, *args: Any) -> R | None:
        try:
            return report(tap, *args)
        except Exception:
            logger.exception("neuroscope: the engine's requests could not be told")
            tap.log.sender.miss()
            return None

    return guarded


class SchedulerTap:
    """Publishes RequestStarted, RequestScheduled and TokensSampled for one engine core."""

    def __init__(self, scheduler: Any, vllm_config: VllmConfig, settings: WorkerSettings) -> None:
        self._layers = settings.layers
        self._engine, self._dp_rank = engine_name(vllm_config), engine_rank(vllm_config)
        assert settings.endpoint is not None
        self.log = RequestLog(
            settings.endpoint,
            engine=self._engine,
            dp_rank=self._dp_rank,
            model=settings.model,
            command=lambda data: self._live_steering.command(data),
        )
        self._live_steering = LiveSteering(
            vllm_config,
            self.log.steering_changed,
            lambda internal_id: internal_id in self.log.live,
        )
        self.log.sender.start()
        atexit.register(self.log.sender.close)
        self._wrap(scheduler)

    @_guarded
    def started(self, request: Any) -> None:
        """`request`: vLLM's EngineCoreRequest, before the scheduler sees it."""
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None or request.resumable:
            return  # pooling, embeddings in place of tokens, a prompt that grows: not observed
        who = identify(request.request_id, request.external_req_id, params)
        steering = steering_of(params)
        salt = salt_of(steering, len(request.prompt_token_ids)) if steering else None
        started = wire.RequestStarted(
            internal_id=request.request_id,
            request_id=who.request_id,
            choice=who.choice,
            engine=self._engine,
            dp_rank=self._dp_rank,
            prompt_token_ids=np.asarray(request.prompt_token_ids, "<i4").tobytes(),
            created=request.arrival_time,
            layers=self._layers,
            stop=[params.stop] if isinstance(params.stop, str) else list(params.stop or []),
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            lora=request.lora_request.lora_name if request.lora_request else None,
            beam=who.beam,
            prefix_root=_prefix_root(request),
            edited_from=salt[0] if salt else None,
            edit_salt=salt[1] if salt else b"",
            steering=steering.describe() if steering else None,
            traceparent=(request.trace_headers or {}).get("traceparent"),
            secret=secret_of(params),
        )
        self.log.started(started)

    def _wrap(self, scheduler: Any) -> None:
        schedule = scheduler.schedule
        update_from_output = scheduler.update_from_output
        finish_requests = scheduler.finish_requests

        def schedule_and_report(*args: Any, **kwargs: Any) -> Any:
            changes = self._changes(scheduler)
            output = schedule(*args, **kwargs)
            live_steering.carry(output, changes or {})
            self._scheduled(output.scheduled_new_reqs)
            return output

        def update_and_report(scheduler_output: Any, model_output: Any, *args: Any) -> Any:
            outputs = update_from_output(scheduler_output, model_output, *args)
            for request_id in rule_stops.end(scheduler, model_output, outputs):
                finish_requests(request_id, RequestStatus.FINISHED_STOPPED)
            self._accepted(output for client in outputs.values() for output in client.outputs)
            return outputs

        def finish_and_report(request_ids: Any, finished_status: Any, *args: Any) -> Any:
            if request_ids is None:
                ended = list(self.log.live)
            else:
                ended = [request_ids] if isinstance(request_ids, str) else list(request_ids)
                request_ids = ended
            sampled = self._ending(ended, finished_status, scheduler)
            result = finish_requests(request_ids, finished_status, *args)
            self._report(sampled or [])
            return result

        scheduler.schedule = schedule_and_report
        scheduler.update_from_output = update_and_report
        scheduler.finish_requests = finish_and_report

    @_guarded
    def _changes(self, scheduler: Any) -> dict[str, Any]:
        return self._live_steering.apply(scheduler)

    @_guarded
    def _scheduled(self, scheduled: Iterable[Any]) -> None:
        """Their first forward pass comes. The V2 runner gets a resumed request as a new one: what
        that one finds in the cache says nothing about what ran the first time."""
        for new in scheduled:
            self.log.scheduled(new.req_id, new.num_computed_tokens)

    @_guarded
    def _ending(self, internal_ids: list[str], status: Any, scheduler: Any) -> list[wire.Sampled]:
        """What there is to say of requests that are about to be ended from outside."""
        reason = status.name.removeprefix("FINISHED_").lower()
        return [
            wire.Sampled(
                internal_id,
                [],
                finish_reason=_REASONS.get(reason, reason),
                computed_tokens=self._computed(scheduler, internal_id),
            )
            for internal_id in internal_ids
            if internal_id in self.log.live
        ]

    def _computed(self, scheduler: Any, internal_id: str) -> int:
        """Positions that have run or are running; a preempted request has forgotten its own."""
        live, request = self.log.live[internal_id], scheduler.requests.get(internal_id)
        generated = len(live.token_ids)
        ran = prompt_tokens(live) + generated - 1 if generated else 0
        return max(ran, request.num_computed_tokens if request is not None else 0)

    @_guarded
    def _accepted(self, outputs: Iterable[Any]) -> None:
        live = self.log.live
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

    @_guarded
    def _report(self, sampled: list[wire.Sampled]) -> None:
        if not sampled:
            return
        self.log.sampled(sampled)
        self._live_steering.ended([one.internal_id for one in sampled if one.finish_reason])


def _prefix_root(request: Any) -> bytes:
    """What decides, beside the tokens, whose prefix-cache blocks a request may share."""
    lora = request.lora_request
    parts = [
        lora.lora_name if lora else "",
        request.cache_salt or "",
        # Placeholders of different images are the same tokens.
        request.request_id if request.mm_features else "",
    ]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


_REASONS = {"stopped": "stop", "length_capped": "length", "aborted": "abort"}


def attach(scheduler: Any, vllm_config: VllmConfig) -> None:
    """Give a freshly built scheduler its tap, if there is a hub to tell."""
    settings = worker_settings(vllm_config)
    if settings is not None and settings.endpoint is not None:
        scheduler.neuroscope_tap = SchedulerTap(scheduler, vllm_config, settings)
