"""Arms a worker: models registered before they are built, steps encoded after they run.

Runs in the worker process. Every tensor-parallel rank builds the observed model, so that all
compile the same graph and steer alike; rank 0 alone encodes and sends, for the layers of its
pipeline stage.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models import ModelRegistry

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sender import Sender
from neuroscope_vllm.engine.serving.pipeline import EncodePipeline, device_name
from neuroscope_vllm.engine.serving.sites import BuiltSite, SiteSettings, load
from neuroscope_vllm.engine.serving.steerer import Steerer
from neuroscope_vllm.engine.serving.step import StepView
from neuroscope_vllm.engine.vllm import self_test
from neuroscope_vllm.engine.vllm.hook import ActivationHook, max_rows
from neuroscope_vllm.engine.vllm.models import OBSERVED
from neuroscope_vllm.engine.vllm.passes import BEGIN_RPC, END_RPC, PassRunner, Site
from neuroscope_vllm.engine.vllm.patching import TAKE_RPC, Patcher
from neuroscope_vllm.engine.vllm.refusals import warnings
from neuroscope_vllm.engine.vllm.rule_stops import Stops
from neuroscope_vllm.engine.vllm.self_test import SelfTest
from neuroscope_vllm.engine.vllm.settings import (
    WorkerSettings,
    engine_name,
    engine_rank,
    worker_settings,
)
from neuroscope_vllm.engine.vllm.steering import take_up
from neuroscope_vllm.engine.vllm.step import is_v2, watch_steps

logger = logging.getLogger(__name__)

PENDING_STEPS = 4
"""Full-size steps that may wait for the encoder before rows are dropped."""


def arm(worker: Any, vllm_config: VllmConfig) -> None:
    """Wrap the runner's `load_model`: register our models, load, then observe.

    Gives vLLM's worker the methods that the self-test and corpus passes call on every rank. No-op
    if unconfigured.
    """
    settings = worker_settings(vllm_config)
    if settings is None:
        return
    runner = worker.model_runner
    load_model = runner.load_model

    def load_observed_model(*args: Any, **kwargs: Any) -> None:
        register_models()
        load_model(*args, **kwargs)
        if settings.patched:
            patcher = Patcher(_hook(runner), reads=get_tensor_model_parallel_rank() == 0)
            watch_steps(runner, patcher)
            setattr(worker, TAKE_RPC, patcher.take)
            test, passes = _nothing()
        else:
            test, passes = observe(runner, vllm_config, settings)
        setattr(worker, self_test.BEGIN_RPC, test.begin)
        setattr(worker, self_test.END_RPC, test.end)
        setattr(worker, BEGIN_RPC, passes.begin)
        setattr(worker, END_RPC, passes.end)

    runner.load_model = load_observed_model


def register_models() -> None:
    for architecture, target in OBSERVED.items():
        module, name = target.split(":")
        ModelRegistry.register_model(architecture, getattr(importlib.import_module(module), name))


def observe(
    runner: Any, vllm_config: VllmConfig, settings: WorkerSettings
) -> tuple[SelfTest, PassRunner]:
    """Watch the runner's steps, on the rank that sends. Raises RuntimeError if there is no hook.

    Returns the self-test that comes before the first step is encoded, and the runner of corpus
    passes; both are of no layers on ranks that send nothing. The engine does one of two things with
    its rows: it streams them to a hub, or it keeps them for passes.
    """
    hook = _hook(runner)
    sites = [site for site in settings.sites if site.layer in hook.layers]
    saes = {site.layer: load(site, settings.settings) for site in sites}
    steerer = None
    if hook.steering is not None:
        directions = {name: one.read() for name, one in settings.operator.directions.items()}
        calibrations = {site.layer: site.load_calibration() for site in sites}
        sink_norms = {
            layer: one.sink_norm for layer, one in calibrations.items() if one is not None
        }
        steerer = Steerer(hook.steering, saes, directions, sink_norms)
    test, passes = _nothing()
    if get_tensor_model_parallel_rank() == 0 and sites:
        built = [_built(site, saes[site.layer], hook, settings) for site in sites]
        if settings.endpoint is None:
            read = [hook.resid_post(site.layer) for site in sites]
            passes = PassRunner(
                [
                    Site(site.layer, rows, saes[site.layer].to(rows.device))
                    for site, rows in zip(sites, read, strict=True)
                ]
            )
            test = _test(built, hook, passes.on_step)
        else:
            test = _stream(built, hook, steerer, runner, vllm_config, settings)
    watch_steps(runner, _Watcher(steerer, test))
    logger.info("neuroscope: observing layers %s of %s", hook.layers, settings.model)
    return test, passes


def _hook(runner: Any) -> ActivationHook:
    model = runner.get_model()  # without the wrapper that CUDA graphs put around it
    hook = next((m for m in model.modules() if isinstance(m, ActivationHook)), None)
    if hook is None:
        raise RuntimeError(
            f"neuroscope: {type(model).__name__} was built without the activation hook;"
            " another plugin may have registered the same architecture."
        )
    return hook


def _nothing() -> tuple[SelfTest, PassRunner]:
    """Of no layers."""
    return SelfTest([], [], on_step=lambda step: None), PassRunner([])


class _Watcher:
    """What is done around each forward pass of a worker."""

    def __init__(self, steerer: Steerer | None, test: SelfTest) -> None:
        self._steerer, self._test = steerer, test

    def starting(self, scheduler_output: Any) -> None:
        if self._steerer is not None:
            take_up(self._steerer, scheduler_output)

    def prepared(self, step: StepView) -> None:
        if self._steerer is not None:
            self._steerer.prepared(step)

    def ran(self, step: StepView) -> None:
        self._test.on_step(step)
        if self._steerer is not None:
            self._steerer.ran()


def _test(
    built: list[BuiltSite], hook: ActivationHook, on_step: Callable[[StepView], None]
) -> SelfTest:
    buffers = [hook.resid_post(site.probe.layer) for site in built]
    return SelfTest([site.probe for site in built], buffers, on_step)


def _stream(
    built: list[BuiltSite],
    hook: ActivationHook,
    steerer: Steerer | None,
    runner: Any,
    vllm_config: VllmConfig,
    settings: WorkerSettings,
) -> SelfTest:
    """Encode every step and send it to the hub, once the self-test has passed."""
    assert settings.endpoint is not None
    engine = engine_name(vllm_config)
    rows = [hook.resid_post(site.probe.layer) for site in built]
    host, device = socket.gethostname(), device_name(rows[0].device)

    def hello(counters: dict[str, int]) -> wire.Hello:
        return wire.Hello(
            sender=f"worker-{engine}-{host}-{os.getpid()}",
            role="worker",
            engine=engine,
            dp_rank=engine_rank(vllm_config),
            model=settings.model,
            armed=test.passed and not pipeline.failing,
            host=host,
            device=device,
            runner="v2" if is_v2(runner) else "v1",
            cudagraph_mode=_cudagraph_mode(vllm_config),
            sites=[site.wire for site in built],
            warnings=[*test.warnings, *warnings(vllm_config)],
            counters={**counters, **pipeline.counters},
            self_test=test.results,
        )

    sender = Sender(settings.endpoint, hello)
    stops = Stops()
    stops.watch_outputs(runner)
    pipeline = EncodePipeline(
        [site.encoder for site in built],
        send=sender.put,
        engine=engine,
        num_layers=len(settings.sites),
        device=rows[0].device,
        max_pending_rows=PENDING_STEPS * max_rows(vllm_config),
        stop=stops.note,
    )

    def submit(step: StepView) -> None:
        steered = [] if steerer is None else steerer.found(step, hook.resid_post)
        pipeline.submit(step, [one[: step.num_rows] for one in rows], steered)

    test = _test(built, hook, submit)
    sender.start()
    atexit.register(sender.close)
    return test


def _built(
    site: SiteSettings, sae: SAE, hook: ActivationHook, settings: WorkerSettings
) -> BuiltSite:
    rows = hook.resid_post(site.layer)
    return BuiltSite(site, sae, settings.settings, device=rows.device, dtype=rows.dtype)


def _cudagraph_mode(vllm_config: VllmConfig) -> str:
    mode = vllm_config.compilation_config.cudagraph_mode
    return "NONE" if mode is None else mode.name
