"""Who is steered, as vLLM's scheduler tells each worker, on every tensor-parallel rank alike: each
holds the whole residual stream."""

from __future__ import annotations

from typing import Any

from neuroscope_vllm.core.steering.settled import Steering, from_dict
from neuroscope_vllm.engine.serving.steerer import Steerer
from neuroscope_vllm.engine.vllm.ids import STEERING
from neuroscope_vllm.engine.vllm.live_steering import carried


def take_up(steerer: Steerer, scheduler_output: Any) -> None:
    """What begins and what is changed in this step; what ended is forgotten."""
    for request_id in scheduler_output.finished_req_ids:
        steerer.forget(request_id)
    for new in scheduler_output.scheduled_new_reqs:
        # The V2 runner gets a preempted request as a new one.
        if not steerer.knows(new.req_id) and new.sampling_params is not None:
            given = (new.sampling_params.extra_args or {}).get(STEERING)
            if given is not None:
                steerer.begin(new.req_id, from_dict(given), _prompt_length(new))
    for request_id, (prompt_length, steering) in carried(scheduler_output).items():
        # Kept without edits too: the V2 runner would begin anew with what the request brought.
        steerer.begin(request_id, steering or Steering(slots=[]), prompt_length)


def _prompt_length(new: Any) -> int:
    if new.prompt_token_ids is not None:
        return len(new.prompt_token_ids)
    return 0 if new.prompt_embeds is None else len(new.prompt_embeds)
