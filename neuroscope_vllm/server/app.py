"""The side process's HTTP application, and what runs beside it: the hub and its ear."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from fastapi import FastAPI
from tokenizers import Tokenizer

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError, NeuroscopeError
from neuroscope_vllm.core.guide import Suggestion, load_guide
from neuroscope_vllm.core.labels import LabelSet, load_labels
from neuroscope_vllm.core.launch import SideConfig
from neuroscope_vllm.server import errors, guard
from neuroscope_vllm.server.access import Access
from neuroscope_vllm.server.cards import CardReader
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.ingest import Ingest
from neuroscope_vllm.server.metrics import registry_of
from neuroscope_vllm.server.routes import (
    features,
    metrics,
    page,
    proxy,
    requests,
    session,
    status,
    steering,
    stream,
)

if TYPE_CHECKING:
    from neuroscope_vllm.server.otel import Export
    from neuroscope_vllm.server.recorder import Recorder

logger = logging.getLogger(__name__)

DESCRIPTION = "Sparse-autoencoder features of every token that vLLM serves, live."


class Feed(Protocol):
    """What tells a hub of requests, on its event loop."""

    def start(self) -> None: ...
    def close(self) -> None: ...


def create_app(config: SideConfig, feed: Callable[[Hub], Feed] | None = None) -> FastAPI:
    """`app.state`: hub; access, who may read it; refusals, counted; metrics, the registry of what
    the hub counts; listening, whether engines can connect; failure, why they never will; upstream,
    the client for vLLM or None; passed, exports, the room for chats by way of us and for exports;
    replay, whether `feed` tells what was recorded; guide, what the page suggests.

    `feed` makes what feeds the hub; None: the engines that connect to `config.endpoint`.
    """
    app = FastAPI(
        title="neuroscope",
        description=DESCRIPTION,
        lifespan=_lifespan,
        redoc_url=None,
        default_response_class=errors.Json,
    )
    app.state.config = config
    app.state.hub = hub = Hub(config.settings, config.model)
    app.state.metrics = registry_of(hub)
    app.state.access = access = Access(config.keys, hub)
    app.state.refusals = guard.Refusals(hub.counters)
    app.state.listening = False
    app.state.failure = None
    app.state.guide = []
    app.state.upstream = proxy.client(config.upstream) if config.upstream else None
    app.state.passed = proxy.Passed(hub.counters)
    app.state.cards = CardReader(hub.counters)
    app.state.exports = page.Exports(hub.counters)
    app.state.replay = feed is not None
    app.state.feed = feed or (lambda hub: Ingest(hub, config.endpoint))
    errors.install(app)
    guard.install(app, access, app.state.refusals, config.settings.allowed_origins)
    for module in (session, stream, features, steering, requests, status, metrics, proxy, page):
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    # A large tokenizer takes seconds to read: serve HTTP meanwhile. Engines wait to connect.
    opening = asyncio.create_task(_open(app))
    yield
    opening.cancel()
    app.state.cards.close()
    with contextlib.suppress(asyncio.CancelledError):
        await opening
    if app.state.upstream is not None:
        await app.state.upstream.aclose()


async def _open(app: FastAPI) -> None:
    """Read tokenizer and labels, then let engines in, until cancelled."""
    config: SideConfig = app.state.config
    hub: Hub = app.state.hub
    try:
        hub.tokenizer, labels = await asyncio.to_thread(_read_files, config)
        hub.set_labels(labels)
        app.state.guide = await asyncio.to_thread(_read_guide, config.settings)
        recorder, export = _recorder(hub, config), _export(hub, config)
        feed: Feed = app.state.feed(hub)
        feed.start()
    except NeuroscopeError as error:
        app.state.failure = str(error)
        logger.error("neuroscope: %s", error)
        return
    except Exception as error:
        app.state.failure = f"the side process can not work: {str(error) or type(error).__name__}"
        logger.exception("neuroscope: the side process can not work")
        return
    app.state.listening = True
    try:
        await asyncio.Future()
    finally:
        feed.close()
        await asyncio.gather(*(one.close() for one in (recorder, export) if one is not None))


def _recorder(hub: Hub, config: SideConfig) -> Recorder | None:
    if config.settings.record is None:
        return None
    from neuroscope_vllm.server.recorder import Recorder  # pyarrow takes 0.3 s and 50 MB

    recorder = Recorder(hub, config)
    recorder.start()
    return recorder


def _export(hub: Hub, config: SideConfig) -> Export | None:
    if not config.settings.otel:
        return None
    from neuroscope_vllm.server.otel import Export  # an extra

    export = Export(hub)
    export.start()
    return export


def _read_files(config: SideConfig) -> tuple[Tokenizer | None, dict[int, list[LabelSet]]]:
    tokenizer = Tokenizer.from_file(config.tokenizer_file) if config.tokenizer_file else None
    return tokenizer, {layer: _read_labels(paths) for layer, paths in config.labels.items()}


def _read_guide(settings: Settings) -> list[Suggestion]:
    """What the page suggests: nothing, if the file was removed or spoilt since it was checked."""
    try:
        return load_guide(settings)
    except ConfigError as error:
        logger.warning("neuroscope: %s", error)
        return []


def _read_labels(paths: list[str]) -> list[LabelSet]:
    """Labels in order of preference. Who started us found the files good; one that was removed or
    is being written since, as a side process that starts again may find, is left out."""
    found = []
    for path in paths:
        try:
            found.append(load_labels(path))
        except ConfigError as error:
            logger.warning("neuroscope: %s", error)
    return found
