"""A vLLM plugin that breaks neuroscope on purpose: every row's residual is its neighbour's.

Put this folder on PYTHONPATH, and `neuroscope verify` must notice. Tokens, positions and requests
stay as they are; only the features belong to the row before, often another request's.
"""

from typing import Any

import torch


def register() -> None:
    """Before the worker is armed: it takes `watch_steps` from its module by name."""
    from neuroscope_vllm.engine.vllm import step

    if step.watch_steps is not shifted:
        global watch_steps
        watch_steps = step.watch_steps
        step.watch_steps = shifted


watch_steps: Any = None


def shifted(runner: Any, watcher: Any) -> None:
    from neuroscope_vllm.engine.vllm.hook import ActivationHook

    hook = next(m for m in runner.get_model().modules() if isinstance(m, ActivationHook))
    ran = watcher.ran

    def ran_shifted(view: Any) -> None:
        with torch.inference_mode():
            for layer in hook.layers:
                rows = hook.resid_post(layer)[: view.num_rows]
                rows.copy_(rows.roll(1, 0))
        ran(view)

    watcher.ran = ran_shifted
    watch_steps(runner, watcher)
