"""The `vllm.general_plugins` entry point. vLLM runs `register` in every process it starts.

It wraps late-bound seams and does nothing else until neuroscope is configured:
- `EngineArgs.create_engine_config` in the front process: resolve, check, start the side process;
- `WorkerWrapperBase.init_device` in workers: arm the model runner before it loads the model;
- `SamplingParams._verify_args`, there too: check and apply what a request asks of us (msgspec
  would call no wrapped `__post_init__`);
- `Scheduler.__init__` and `EngineCore.preprocess_add_request` in engine cores: tap the scheduler;
  `EngineCore.__init__`: the self-test, once the engine can run.
Wrapping is idempotent. Importing this module imports nothing heavy.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from neuroscope_vllm.core.config import RUNTIME_VARIABLE

_MARK = "_neuroscope_wrapped"


def register() -> None:
    """Called by vLLM, possibly several times in a process."""
    from neuroscope_vllm.engine.vllm import compat

    # Only modules already loaded are wrapped: the process that needs a seam has imported it.
    if "vllm.engine.arg_utils" in sys.modules:
        from vllm.engine.arg_utils import EngineArgs

        wrap(EngineArgs, "create_engine_config", _create_engine_config)
    if not compat.served():
        return  # what was wrapped says so, if we are configured
    if "vllm.v1.worker.worker_base" in sys.modules:
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        wrap(WorkerWrapperBase, "init_device", _init_device)
    if RUNTIME_VARIABLE in os.environ:
        wrap_engine()


def wrap_engine() -> None:
    """Wrap what forked engine processes will inherit, and what spawned ones need."""
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrap(VllmConfig, "compute_hash", _compute_hash)
    wrap(SamplingParams, "_verify_args", _sampling_params)
    wrap(Scheduler, "__init__", _scheduler_init)
    wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    wrap(EngineCore, "__init__", _engine_core_init)
    wrap(EngineCoreProc, "run_busy_loop", _run_busy_loop)
    wrap(WorkerWrapperBase, "init_device", _init_device)
    if EngineCoreProc.run_engine_core is not run_engine_core:
        _originals["run_engine_core"] = EngineCoreProc.run_engine_core
        EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


def wrap_beam_search() -> None:
    """In a process that takes requests: their classes are imported there, or never."""
    for family in ("chat_completion", "completion"):
        module = sys.modules.get(f"vllm.entrypoints.openai.{family}.protocol")
        for name in ("ChatCompletionRequest", "CompletionRequest"):
            owner = getattr(module, name, None)
            if owner is not None:
                wrap(owner, "to_beam_search_params", _to_beam_search_params)


def _to_beam_search_params(original: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    from neuroscope_vllm.engine.vllm.admission import refuse_beams

    refuse_beams(request.vllm_xargs)
    return original(request, *args, **kwargs)


_originals: dict[str, Callable[..., None]] = {}
_fronts: set[int] = set()  # processes that take requests; forks of them do not
_engine_process = threading.Event()  # set in a process that is an engine core and nothing else


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """What vLLM starts as an engine-core process, in place of its own function.

    A spawned process unpickles this by name. vLLM itself loads plugins inside
    `EngineCore.__init__`, too late to wrap that.
    """
    wrap_engine()
    _engine_process.set()
    _originals["run_engine_core"](*args, **kwargs)


def wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, self, ...)`, once."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def _create_engine_config(original: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    from neuroscope_vllm.engine.vllm import front

    _fronts.add(os.getpid())
    return front.create_engine_config(original, engine_args, *args, **kwargs)


def _init_device(original: Any, wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    from neuroscope_vllm.engine.vllm.settings import worker_settings

    result = original(wrapper, *args, **kwargs)
    if worker_settings(wrapper.vllm_config) is not None:
        from neuroscope_vllm.engine.vllm import worker

        wrap_engine()
        worker.arm(wrapper.worker, wrapper.vllm_config)
    return result


def _scheduler_init(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    from neuroscope_vllm.engine.vllm import scheduler as tap

    original(scheduler, *args, **kwargs)
    tap.attach(scheduler, scheduler.vllm_config)


def _preprocess_add_request(original: Any, engine_core: Any, request: Any) -> Any:
    from neuroscope_vllm.engine.vllm import prefix_salt

    prefix_salt.salt_whole(request)
    tap = getattr(engine_core.scheduler, "neuroscope_tap", None)
    if tap is not None:
        tap.started(request)
    return original(engine_core, request)


def _sampling_params(original: Any, params: Any) -> None:
    from neuroscope_vllm.engine.vllm.admission import admit

    original(params)
    # Engine cores and workers make SamplingParams too, when they unpack what was admitted.
    if os.getpid() in _fronts:
        admit(params)


def _engine_core_init(original: Any, engine_core: Any, *args: Any, **kwargs: Any) -> None:
    from neuroscope_vllm.engine.vllm import prefix_salt, self_test
    from neuroscope_vllm.engine.vllm.settings import worker_settings

    original(engine_core, *args, **kwargs)
    settings = worker_settings(engine_core.vllm_config)
    edits = settings is not None and (settings.steered or settings.patched)
    if edits and engine_core.request_block_hasher is not None:
        engine_core.request_block_hasher = prefix_salt.salting(
            engine_core.request_block_hasher, engine_core.scheduler.hash_block_size
        )
    try:
        self_test.run(engine_core)
    except self_test.SelfTestFailed as failure:
        if not _engine_process.is_set():
            raise
        sys.exit(str(failure))  # one line in the log; vLLM would print two tracebacks


def _run_busy_loop(original: Any, engine_core: Any) -> Any:
    """Ray's engine actors begin elsewhere than `run_engine_core`: test them here, a little late."""
    from neuroscope_vllm.engine.vllm import self_test

    self_test.run(engine_core)
    return original(engine_core)


def _compute_hash(original: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> str:
    """Salt the compile cache with what the graph depends on, and only that.

    vLLM hashes additional_config as a whole; ours holds paths and ports that change between runs
    without changing the graph.
    """
    from neuroscope_vllm.engine.vllm.settings import KEY, worker_settings

    settings = worker_settings(vllm_config)
    if settings is None:
        return original(vllm_config, *args, **kwargs)
    full = vllm_config.additional_config
    vllm_config.additional_config = {**full, KEY: settings.graph_salt()}
    try:
        return original(vllm_config, *args, **kwargs)
    finally:
        vllm_config.additional_config = full
