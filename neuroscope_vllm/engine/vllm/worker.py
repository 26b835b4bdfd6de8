"""Arms a worker: models registered before they are built, steps encoded after they run.

Runs in the worker process. Every tensor-parallel rank builds the observed model, so that all
compile the same graph; rank 0 alone encodes and sends, for the layers of its pipeline stage.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
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
from neuroscope_vllm.core.sender import Sender
from neuroscope_vllm.engine.vllm.hook import ActivationHook, max_rows
from neuroscope_vllm.engine.vllm.models import OBSERVED
from neuroscope_vllm.engine.vllm.pipeline import EncodePipeline, LayerEncoder
from neuroscope_vllm.engine.vllm.refusals import warnings
from neuroscope_vllm.engine.vllm.settings import SiteSettings, WorkerSettings, worker_settings
from neuroscope_vllm.engine.vllm.step import is_v2, watch_steps

logger = logging.getLogger(__name__)

PENDING_STEPS = 4
"""Full-size steps that may wait for the encoder before rows are dropped."""


def arm(runner: Any, vllm_config: VllmConfig) -> None:
    """Wrap `runner.load_model`: register our models, load, then observe. No-op if unconfigured."""
    settings = worker_settings(vllm_config)
    if settings is None:
        return
    load_model = runner.load_model

    def load_observed_model(*args: Any, **kwargs: Any) -> None:
        register_models()
        load_model(*args, **kwargs)
        observe(runner, vllm_config, settings)

    runner.load_model = load_observed_model


def register_models() -> None:
    for architecture, target in OBSERVED.items():
        module, name = target.split(":")
        ModelRegistry.register_model(architecture, getattr(importlib.import_module(module), name))


def observe(runner: Any, vllm_config: VllmConfig, settings: WorkerSettings) -> None:
    """Start encoding on the rank that sends. Raises RuntimeError if the model has no hook."""
    model = runner.get_model()  # without the wrapper that CUDA graphs put around it
    hook = next((m for m in model.modules() if isinstance(m, ActivationHook)), None)
    if hook is None:
        raise RuntimeError(
            f"neuroscope: {type(model).__name__} was built without the activation hook;"
            " another plugin may have registered the same architecture."
        )
    if get_tensor_model_parallel_rank() != 0 or not hook.layers:
        return
    encoders = [
        _layer_encoder(site, hook, settings) for site in settings.sites if site.layer in hook.layers
    ]
    parallel = vllm_config.parallel_config

    def hello(counters: dict[str, int]) -> wire.Hello:
        return wire.Hello(
            sender=f"worker-{parallel.data_parallel_rank}-{os.getpid()}",
            role="worker",
            dp_rank=parallel.data_parallel_rank,
            model=settings.model,
            armed=not pipeline.failing,
            runner="v2" if is_v2(runner) else "v1",
            cudagraph_mode=_cudagraph_mode(vllm_config),
            sites=[_wire_site(encoder, settings) for encoder in encoders],
            warnings=warnings(vllm_config),
            counters={**counters, **pipeline.counters},
        )

    sender = Sender(settings.endpoint, hello)
    pipeline = EncodePipeline(
        encoders,
        send=sender.put,
        dp_rank=parallel.data_parallel_rank,
        max_pending_rows=PENDING_STEPS * max_rows(vllm_config),
    )
    watch_steps(runner, pipeline.submit)
    sender.start()
    atexit.register(sender.close)
    logger.info("neuroscope: observing layers %s of %s", hook.layers, settings.model)


def _layer_encoder(
    site: SiteSettings, hook: ActivationHook, settings: WorkerSettings
) -> LayerEncoder:
    rows = hook.resid_post(site.layer)
    sae = load_sae(site.source).to(rows.device)
    calibration = Calibration.load(site.calibration) if site.calibration else None
    ranker = make_ranker(
        _ranking(settings, calibration is not None),
        calibration,
        max_frequency=settings.settings.max_frequency,
        width=sae.info.width,
        device=rows.device,
    )
    topk = TopKEncoder(sae, ranker, k=settings.settings.top_k, select_dtype=_select_dtype(rows))
    return LayerEncoder(
        layer=site.layer,
        rows=rows,
        topk=topk,
        sink_norm=calibration.sink_norm if calibration else None,
        rms_input=settings.settings.sae_input == "rms",
    )


def _ranking(settings: WorkerSettings, calibrated: bool) -> str:
    return settings.settings.ranking or ("zscore" if calibrated else "activation")


def _select_dtype(rows: torch.Tensor) -> torch.dtype:
    """Select in bf16 where the residual itself is; values are recomputed in fp32 either way."""
    return torch.float32 if rows.dtype == torch.float32 else torch.bfloat16


def _wire_site(encoder: LayerEncoder, settings: WorkerSettings) -> wire.Site:
    site = next(site for site in settings.sites if site.layer == encoder.layer)
    return wire.Site(
        layer=encoder.layer,
        sae=site.info,
        ranking=_ranking(settings, site.calibration is not None),
        top_k=encoder.topk.k,
        sink_norm=encoder.sink_norm,
    )


def _cudagraph_mode(vllm_config: VllmConfig) -> str:
    mode = vllm_config.compilation_config.cudagraph_mode
    return "NONE" if mode is None else mode.name
