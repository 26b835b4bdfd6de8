"""The front process: resolve the configuration, check it against the model, start the side process.

Everything that can be wrong is said here, in one sentence, before an engine process exists.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from vllm.config import VllmConfig

from neuroscope_vllm.core import access, launch
from neuroscope_vllm.core.config import (
    KEYS_VARIABLES,
    RUNTIME_VARIABLE,
    Settings,
    asked_for,
    resolve,
)
from neuroscope_vllm.core.errors import ConfigError, NeuroscopeError
from neuroscope_vllm.core.guide import check_presets
from neuroscope_vllm.core.keys import check_reachable, hub_endpoint
from neuroscope_vllm.core.sae.observed import named
from neuroscope_vllm.core.steering.catalogue import Operator
from neuroscope_vllm.engine.serving.sites import SiteSettings, find_sites, layers_of
from neuroscope_vllm.engine.vllm import admission, compat, plugin, steer_catalogue
from neuroscope_vllm.engine.vllm.refusals import check_served, warnings
from neuroscope_vllm.engine.vllm.settings import KEY, WorkerSettings, given_flags

logger = logging.getLogger(__name__)


class _Door(NamedTuple):
    """What a side process of this process's own will listen on; vLLM's URL, and all keys."""

    listener: socket.socket
    own_url: str | None
    keys: access.KeyDigests


_passes_only = ContextVar("passes_only", default=False)


@contextlib.contextmanager
def passes_only() -> Iterator[None]:
    """An engine that is built inside has no hub and streams nothing: corpus passes read it."""
    token = _passes_only.set(True)
    try:
        yield
    finally:
        _passes_only.reset(token)


_patched = ContextVar("patched", default=False)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """An engine that is built inside has no SAEs; residuals of all its layers are replaced."""
    token = _patched.set(True)
    try:
        yield
    finally:
        _patched.reset(token)


def create_engine_config(original: Any, engine_args: Any, *args: Any, **kwargs: Any) -> VllmConfig:
    """vLLM's own `create_engine_config`, then ours on top. Runs once per front process.

    API servers beside the first (`--api-server-count`) find the side process running and only
    pass its address on.
    """
    if _patched.get():
        compat.check_version()
        return _create_patched(original(engine_args, *args, **kwargs))
    flags = given_flags(engine_args)
    if not asked_for(flags, os.environ):
        return original(engine_args, *args, **kwargs)
    serving = _is_server(args, kwargs)
    try:
        settings = resolve(flags)
        if not settings.configured:
            return original(engine_args, *args, **kwargs)
        compat.check_version()
        streams = not _passes_only.get()
        hub = hub_endpoint(settings) if streams else None
        if streams:
            check_reachable(settings)
        door = None
        if serving and settings.hub is None and RUNTIME_VARIABLE not in os.environ:
            # Before vLLM's own work: a taken port should not cost a model download.
            door = _open_door(settings)
        for name in KEYS_VARIABLES:
            os.environ.pop(name, None)  # no process of the engine has use for them
        vllm_config = original(engine_args, *args, **kwargs)
        check_served(vllm_config)
        settings = named(settings, vllm_config.model_config.model)
        model = vllm_config.model_config
        sites, steered = find_sites(
            settings,
            model.model,
            d_model=model.get_hidden_size(),
            num_layers=model.get_total_num_hidden_layers(),
            calibrated=streams,
        )
        operator = Operator.load(settings.steering)
        check_presets(settings, operator.presets)
        if streams:
            admission.steer_with(steer_catalogue.build(steered, operator, vllm_config))
        endpoint = _endpoint(hub, settings, vllm_config, door, sites) if streams else None
    except NeuroscopeError as error:
        if serving:
            sys.exit(f"neuroscope: {error}")
        raise
    resolved = WorkerSettings(
        sites=sites,
        endpoint=endpoint,
        model=_served_name(vllm_config),
        settings=settings,
        operator=operator,
    )
    _store(resolved, vllm_config)
    plugin.wrap_beam_search()
    for sentence in warnings(vllm_config):
        logger.warning("neuroscope: %s", sentence)
    return vllm_config


def _create_patched(vllm_config: VllmConfig) -> VllmConfig:
    check_served(vllm_config)
    if (store := steer_catalogue.connector(vllm_config)) is not None:
        raise ConfigError(
            f"{store} would hand patched keys and values to others; patch without"
            " --kv-transfer-config."
        )
    model = vllm_config.model_config
    resolved = WorkerSettings(
        sites=[],
        endpoint=None,
        model=_served_name(vllm_config),
        settings=Settings(),
        patched=list(range(model.get_total_num_hidden_layers())),
    )
    _store(resolved, vllm_config)
    return vllm_config


def _store(resolved: WorkerSettings, vllm_config: Any) -> None:
    """Where every process of the engine finds it."""
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        KEY: resolved.to_dict(),
    }
    plugin.wrap_engine()


def _endpoint(
    hub: str | None,
    settings: Settings,
    vllm_config: VllmConfig,
    door: _Door | None,
    sites: list[SiteSettings],
) -> str:
    """Where workers connect; starts the side process if this process is to have one."""
    if _spans_hosts(vllm_config) and not (hub or "").startswith("tcp://"):
        raise ConfigError(
            "this engine spans several hosts, which share no unix socket; run `neuroscope hub` on"
            " one of them, and give its tcp:// address as hub, with hub_keys, on all."
        )
    if hub is not None:
        os.environ.setdefault(RUNTIME_VARIABLE, hub)
        return hub
    if directory := os.environ.get(RUNTIME_VARIABLE):
        return launch.endpoint_of(Path(directory))
    if door is None:
        raise ConfigError(
            "neuroscope has no hub to send features to: offline engines need `hub`, the endpoint"
            " of a side process; `neuroscope hub` runs one."
        )
    directory = launch.runtime_directory()
    side = launch.launch(
        settings,
        model=_served_name(vllm_config),
        directory=directory,
        listener=door.listener,
        tokenizer_file=_tokenizer_file(vllm_config, directory),
        upstream=settings.upstream or door.own_url,
        labels=launch.label_files(settings, layers_of(settings, sites)),
        model_source=_model_source(vllm_config),
        keys=door.keys,
    )
    atexit.register(side.stop)
    layers = ", ".join(str(site.layer) for site in sites)
    logger.info(
        "neuroscope: features of layer %s on http://%s:%d",
        layers,
        *door.listener.getsockname()[:2],
    )
    return launch.endpoint_of(directory)


def _open_door(settings: Settings) -> _Door:
    """Raises ConfigError, for example if the port is taken."""
    own_url, vllm_keys = _own_server()
    keys = access.key_digests(settings, vllm_keys)
    launch.check_side(settings, keys)
    listener = launch.listen(settings.features_host, settings.features_port)
    return _Door(listener, own_url, keys)


def _spans_hosts(vllm_config: VllmConfig) -> bool:
    """Whether workers of this front process run elsewhere, as far as its flags tell.

    Ray decides later; there a worker without a hub says so itself.
    """
    parallel = vllm_config.parallel_config
    balanced = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    remote_ranks = parallel.data_parallel_size_local < parallel.data_parallel_size
    return parallel.nnodes > 1 or (remote_ranks and not balanced)


def _tokenizer_file(vllm_config: VllmConfig, directory: Path) -> Path | None:
    """vLLM's own tokenizer as a tokenizer.json, so that the hub's text is vLLM's text."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    path = directory / "tokenizer.json"
    backend.save(str(path))
    return path


def _served_name(vllm_config: VllmConfig) -> str:
    name = vllm_config.model_config.served_model_name
    if isinstance(name, list):
        name = name[0] if name else None
    return name or vllm_config.model_config.model


def _model_source(vllm_config: VllmConfig) -> str:
    model = vllm_config.model_config
    return f"{model.model}@{model.revision}" if model.revision else model.model


def _own_server() -> tuple[str | None, list[str]]:
    """vLLM's base URL as this process was asked to serve it, None if it is not a server; its keys.

    Neither is part of EngineArgs, so vLLM's own parser reads the command line once more.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = sys.argv[2:] if sys.argv[1:2] == ["serve"] else sys.argv[1:]
    parser = compat.make_arg_parser(FlexibleArgumentParser())
    try:
        given: Any = parser.parse_args(words)  # unlike parse_known_args it reads vLLM's --config
    except SystemExit:
        # Another program that embeds vLLM's server; its command line is its own.
        return None, access.vllm_keys()
    keys = [key for key in given.api_key or access.vllm_keys() if key]
    if given.uds:
        return None, keys
    scheme = "https" if given.ssl_certfile else "http"
    host = given.host if given.host not in (None, "", "0.0.0.0", "::") else "127.0.0.1"
    return f"{scheme}://{launch.url_host(host)}:{given.port}", keys


def _is_server(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    from vllm.usage.usage_lib import UsageContext

    context = kwargs.get("usage_context", args[0] if args else None)
    return context == UsageContext.OPENAI_API_SERVER
