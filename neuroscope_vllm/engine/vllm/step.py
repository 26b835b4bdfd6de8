"""Whose rows are in a step: one StepView for both of vLLM's model runners.

The mapping is read where vLLM has just made it, never before `execute_model`: V1 sorts and
condenses its batch in `_update_states`, V2 sorts in `gather_batch_req_state`. A runner that tells
its rows itself (`patches/`) does so in the same place. Dummy, profile and capture runs pass through
none of these seams. V2's kernel warm-up on a GPU does; `self_test` drops what
comes before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from neuroscope_vllm.engine.serving.step import StepView
from neuroscope_vllm.engine.vllm.compat import step_views


class StepWatcher(Protocol):
    """Called on the runner's thread, around each real forward pass."""

    def starting(self, scheduler_output: Any) -> None:
        """vLLM's SchedulerOutput of the step, which may be without a row."""

    def prepared(self, step: StepView) -> None:
        """The inputs are there; the forward pass comes."""

    def ran(self, step: StepView) -> None:
        """The hook's buffers hold the step's rows (stream-ordered on CUDA)."""


def watch_steps(runner: Any, watcher: StepWatcher) -> None:
    """Have `watcher` called around each real forward pass of `runner`."""
    pending: list[StepView] = []

    def prepared(step: StepView) -> None:
        pending[:] = [step]
        watcher.prepared(step)

    views = step_views(runner)
    if views is not None:
        views.append(lambda view: prepared(_of_vllm(view)))
    else:
        (_watch_v2_inputs if is_v2(runner) else _watch_v1_inputs)(runner, prepared)
    execute_model = runner.execute_model

    def execute_and_report(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        pending.clear()
        if not (kwargs.get("dummy_run") or args[1:2] == (True,)):  # the V2 runner's own
            watcher.starting(scheduler_output)
        output = execute_model(scheduler_output, *args, **kwargs)
        if pending:
            watcher.ran(pending.pop())
        return output

    runner.execute_model = execute_and_report


def is_v2(runner: Any) -> bool:
    return hasattr(runner, "prepare_inputs")


def _of_vllm(view: Any) -> StepView:
    """From vLLM's own StepView, where `patches/` is applied."""
    return StepView(
        view.req_ids,
        view.query_start_loc.tolist(),
        view.positions,
        view.input_ids,
        view.num_computed_tokens.tolist(),
    )


def _watch_v2_inputs(runner: Any, prepared: Callable[[StepView], None]) -> None:
    prepare_inputs = runner.prepare_inputs

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        batch = prepare_inputs(*args, **kwargs)
        starts = batch.query_start_loc_np[: batch.num_reqs + 1].tolist()
        first = batch.num_computed_tokens_np[: batch.num_reqs].tolist()
        prepared(_view(batch.req_ids, starts, batch.positions, batch.input_ids, first))
        return batch

    runner.prepare_inputs = wrapper


def _watch_v1_inputs(runner: Any, prepared: Callable[[StepView], None]) -> None:
    prepare_inputs = runner._prepare_inputs

    def wrapper(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        result = prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        starts = [0, *np.cumsum(num_scheduled_tokens).tolist()]
        batch = runner.input_batch
        prepared(
            _view(
                list(batch.req_ids),
                starts,
                runner.positions,
                runner.input_ids.gpu,
                batch.num_computed_tokens_cpu[: len(starts) - 1].tolist(),
            )
        )
        return result

    runner._prepare_inputs = wrapper


def _view(
    request_ids: list[str],
    row_starts: list[int],
    positions: Tensor,
    token_ids: Tensor,
    first_positions: list[int],
) -> StepView:
    rows = row_starts[-1]
    return StepView(request_ids, row_starts, positions[:rows], token_ids[:rows], first_positions)
