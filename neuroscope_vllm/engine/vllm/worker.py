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
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models import ModelRegistry

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.ranking import make_ranker
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.sae.encoder import TopKEncoder
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sender import Sender
from neuroscope_vllm.engine.vllm import self_test
from neuroscope_vllm.engine.vllm.hook import ActivationHook, max_rows
from neuroscope_vllm.engine.vllm.models import OBSERVED
from neuroscope_vllm.engine.vllm.passes import BEGIN_RPC, END_RPC, PassRunner, Site
from neuroscope_vllm.engine.vllm.patching import TAKE_RPC, Patcher
from neuroscope_vllm.engine.vllm.pipeline import EncodePipeline, LayerEncoder
from neuroscope_vllm.engine.vllm.refusals import warnings
from neuroscope_vllm.engine.vllm.rule_stops import Stops
from neuroscope_vllm.engine.vllm.self_test import Probe, SelfTest
from neuroscope_vllm.engine.vllm.settings import (
    SiteSettings,
    WorkerSettings,
    engine_name,
    engine_rank,
    worker_settings,
)
from neuroscope_vllm.engine.vllm.steer_report import SpanSteering
from neuroscope_vllm.engine.vllm.steering import Steerer
from neuroscope_vllm.engine.vllm.step import StepView, is_v2, watch_steps

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
    saes = {
        site.layer: _sae(site, settings) for site in settings.sites if site.layer in hook.layers
    }
    steerer = None
    if hook.steering is not None:
        directions = {name: one.read() for name, one in settings.operator.directions.items()}
        sink_norms = {
            site.layer: Calibration.load(site.calibration).sink_norm
            for site in settings.sites
            if site.calibration is not None
        }
        steerer = Steerer(hook.steering, saes, directions, sink_norms)
    test, passes = _nothing()
    if get_tensor_model_parallel_rank() == 0 and saes:
        built = [
            _layer_encoder(site, saes[site.layer], hook, settings)
            for site in settings.sites
            if site.layer in saes
        ]
        probes = [probe for _, probe in built]
        if settings.endpoint is None:
            passes = PassRunner(
                [Site(p.layer, p.buffer, p.sae.to(p.buffer.device)) for p in probes]
            )
            test = SelfTest(probes, on_step=passes.on_step)
        else:
            encoders = [encoder for encoder, _ in built]
            found = _found(steerer, hook)
            test = _stream(encoders, probes, runner, vllm_config, settings, found)
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
    return SelfTest([], on_step=lambda step: None), PassRunner([])


class _Watcher:
    """What is done around each forward pass of a worker."""

    def __init__(self, steerer: Steerer | None, test: SelfTest) -> None:
        self._steerer, self._test = steerer, test

    def starting(self, scheduler_output: Any) -> None:
        if self._steerer is not None:
            self._steerer.starting(scheduler_output)

    def prepared(self, step: StepView) -> None:
        if self._steerer is not None:
            self._steerer.prepared(step)

    def ran(self, step: StepView) -> None:
        self._test.on_step(step)
        if self._steerer is not None:
            self._steerer.ran()


def _stream(
    encoders: list[LayerEncoder],
    probes: list[Probe],
    runner: Any,
    vllm_config: VllmConfig,
    settings: WorkerSettings,
    found: Callable[[StepView], list[SpanSteering]],
) -> SelfTest:
    """Encode every step and send it to the hub, once the self-test has passed. `found`: what
    steering did in the step."""
    assert settings.endpoint is not None
    engine = engine_name(vllm_config)
    sites = [_wire_site(encoder, settings) for encoder in encoders]

    def hello(counters: dict[str, int]) -> wire.Hello:
        return wire.Hello(
            sender=f"worker-{engine}-{os.getpid()}",
            role="worker",
            engine=engine,
            dp_rank=engine_rank(vllm_config),
            model=settings.model,
            armed=test.passed and not pipeline.failing,
            runner="v2" if is_v2(runner) else "v1",
            cudagraph_mode=_cudagraph_mode(vllm_config),
            sites=sites,
            warnings=[*test.warnings, *warnings(vllm_config)],
            counters={**counters, **pipeline.counters},
            self_test=test.results,
        )

    sender = Sender(settings.endpoint, hello)
    stops = Stops()
    stops.watch_outputs(runner)
    pipeline = EncodePipeline(
        encoders,
        send=sender.put,
        engine=engine,
        num_layers=len(settings.sites),
        max_pending_rows=PENDING_STEPS * max_rows(vllm_config),
        stop=stops.note,
    )
    test = SelfTest(probes, on_step=lambda step: pipeline.submit(step, found(step)))
    sender.start()
    atexit.register(sender.close)
    return test


def _found(
    steerer: Steerer | None, hook: ActivationHook
) -> Callable[[StepView], list[SpanSteering]]:
    if steerer is None:
        return lambda step: []
    return lambda step: steerer.found(step, hook.resid_post)


def _sae(site: SiteSettings, settings: WorkerSettings) -> SAE:
    loaded = load_sae(site.source)
    return loaded.reading_rms() if settings.settings.sae_input == "rms" else loaded


def _layer_encoder(
    site: SiteSettings, loaded: SAE, hook: ActivationHook, settings: WorkerSettings
) -> tuple[LayerEncoder, Probe]:
    rows = hook.resid_post(site.layer)
    sae = loaded.to(rows.device)
    calibration = Calibration.load(site.calibration) if site.calibration else None
    ranker = make_ranker(
        settings.settings.ranking_of(calibration is not None),
        calibration,
        max_frequency=settings.settings.max_frequency,
        width=sae.info.width,
        device=rows.device,
    )
    topk = TopKEncoder(sae, ranker, k=settings.settings.top_k, select_dtype=_select_dtype(rows))
    encoder = LayerEncoder(
        layer=site.layer,
        rows=rows,
        topk=topk,
        sink_norm=calibration.sink_norm if calibration else None,
    )
    expected_l0 = self_test.expected_l0(site.info, calibration)
    return encoder, Probe(encoder, loaded, expected_l0)


def _select_dtype(rows: torch.Tensor) -> torch.dtype:
    """Select in bf16 where the residual itself is; values are recomputed in fp32 either way."""
    return torch.float32 if rows.dtype == torch.float32 else torch.bfloat16


def _wire_site(encoder: LayerEncoder, settings: WorkerSettings) -> wire.Site:
    site = next(site for site in settings.sites if site.layer == encoder.layer)
    return wire.Site(
        layer=encoder.layer,
        sae=site.info,
        ranking=settings.settings.ranking_of(site.calibration is not None),
        top_k=encoder.topk.k,
        sink_norm=encoder.sink_norm,
        dtype=str(encoder.rows.dtype).removeprefix("torch."),
        calibration=site.calibration,
        sae_input=settings.settings.sae_input,
        max_frequency=settings.settings.max_frequency,
        dense=Calibration.load(site.calibration).dense if site.calibration else [],
    )


def _cudagraph_mode(vllm_config: VllmConfig) -> str:
    mode = vllm_config.compilation_config.cudagraph_mode
    return "NONE" if mode is None else mode.name
