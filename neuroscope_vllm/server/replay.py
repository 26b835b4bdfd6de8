"""Recorded requests, told by a hub again: the side process without an engine."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import NeuroscopeError
from neuroscope_vllm.core.labels import stored_labels
from neuroscope_vllm.core.launch import SideConfig
from neuroscope_vllm.core.recording.files import Place, Recording
from neuroscope_vllm.core.recording.timeline import Told, timeline
from neuroscope_vllm.core.sender import HELLO_INTERVAL_S
from neuroscope_vllm.server.app import create_app
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.traces import Event, Trace

logger = logging.getLogger(__name__)

BATCH_EVENTS = 256
AUDIENCE_S = 2.0
"""How long after the first question to this process a reader may take to come."""


def replay_config(recording: Recording, places: Sequence[Place], port: int) -> SideConfig:
    """Of a side process that tells these. Labels are those that this machine has of the SAEs."""
    sites = recording.about.sites
    settings = Settings(
        top_k=max((site.top_k for site in sites), default=Settings().top_k),
        trace_requests=max(len(places), Settings().trace_requests),
        features_port=port,
    )
    return SideConfig(
        settings=settings,
        endpoint="",
        model=recording.about.model,
        tokenizer_file=None,
        upstream=None,
        labels={site.layer: [str(p) for p in stored_labels(site.sae.source)] for site in sites},
        model_source=recording.about.model_source,
    )


def create_replay(
    config: SideConfig, recording: Recording, places: Sequence[Place], speed: float
) -> FastAPI:
    """The side process's application, fed from a recording.

    Args:
        places: What to tell, by when it began.
        speed: How often faster than it was; 0: at once. Unless at once, it begins with the first
            reader of the stream, or shortly after anybody has asked for anything else.
    """
    asked = asyncio.Event()

    def fail(why: str) -> None:
        app.state.failure = why  # which ends the process, with that sentence

    app = create_app(config, lambda hub: Replay(hub, recording, places, speed, asked, fail))
    app.add_middleware(_Noticed, asked=asked)
    return app


class Replay:
    """Feeds a hub from a recording, until closed."""

    def __init__(
        self,
        hub: Hub,
        recording: Recording,
        places: Sequence[Place],
        speed: float,
        asked: asyncio.Event,
        fail: Callable[[str], None],
    ) -> None:
        self._hub = hub
        self._recording = recording
        self._places = places
        self._speed = speed
        self._asked = asked
        self._fail = fail
        self._traces: dict[int, Trace | None] = {}
        self._epoch: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._hub.tokenizer = _knowing(self._recording.about.special_token_ids)
        self._hello()
        self._tasks = [asyncio.create_task(self._greeting()), asyncio.create_task(self._tell())]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _greeting(self) -> None:
        while True:
            await asyncio.sleep(HELLO_INTERVAL_S)
            self._hello()

    def _hello(self) -> None:
        about = self._recording.about
        hello = wire.Hello(
            sender="replay",
            role="worker",
            engine="replay",
            dp_rank=0,
            model=about.model,
            armed=True,
            runner="replay",
            sites=about.sites,
        )
        self._hub.handle(hello)

    async def _tell(self) -> None:
        try:
            await self._tell_all()
            logger.info("neuroscope: all is told, and stays to be looked at until Ctrl-C")
        except NeuroscopeError as error:
            self._fail(f"the replay ended: {error}")
        except Exception as error:
            logger.exception("neuroscope: the replay ended")
            self._fail(f"the replay ended: {error}")

    async def _tell_all(self) -> None:
        told = timeline(self._recording, self._places)
        batch = await _some(told)
        if not batch:
            return
        self._take_epoch(batch[0])
        if self._speed:
            await self._audience()
        start = time.monotonic()
        while batch:
            for one in batch:
                wait = start + one.due / self._speed - time.monotonic() if self._speed else 0.0
                if wait > 0:
                    await asyncio.sleep(wait)
                self._retell(one)
            batch = await _some(told)

    def _take_epoch(self, first: Told) -> None:
        """Where all is of one process, in its order, readers resume as they could there."""
        epochs = {place.head.epoch for place in self._places}
        if len(epochs) == 1 and all(place.head.started is not None for place in self._places):
            self._epoch = self._hub.epoch = first.event.epoch
            self._hub.ring.first = self._hub.ring.end = first.event.seq

    async def _audience(self) -> None:
        await self._asked.wait()
        until = time.monotonic() + AUDIENCE_S
        while not self._hub.readers and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def _retell(self, told: Told) -> None:
        if told.trace not in self._traces:
            self._begin(told)
        trace, event = self._traces[told.trace], told.event
        if trace is None:
            return
        seq = self._hub.ring.end if self._epoch is None else event.seq
        made = Event.make(seq, event.name, event.layer, event.id, event.json, trace)
        self._hub.retell(trace, made)
        if event.name == "done":
            del self._traces[told.trace]

    def _begin(self, told: Told) -> None:
        """None is told of one that runs already, as in a copy."""
        head = told.head
        if any(one and one.internal_id == head.internal_id for one in self._traces.values()):
            self._traces[told.trace] = None
            return
        ids = head.internal_id, head.request_id, head.choice
        trace = Trace(*ids, head.created, head.secret)
        trace.first = trace.end = head.events_total - head.events
        self._hub.begin(trace)
        self._traces[told.trace] = trace


async def _some(told: Iterator[Told]) -> list[Told]:
    """The next few, which may have to be read from a disk."""
    return await asyncio.to_thread(lambda: list(itertools.islice(told, BATCH_EVENTS)))


def _knowing(special_token_ids: Sequence[int]) -> Tokenizer:
    """A tokenizer that knows which tokens are special, and nothing else."""
    names = {f"<{token_id}>": token_id for token_id in special_token_ids}
    tokenizer = Tokenizer(WordLevel(names, unk_token=""))
    tokenizer.add_special_tokens(list(names))
    return tokenizer


class _Noticed:
    """Notes that somebody asked for something."""

    def __init__(self, app: ASGIApp, asked: asyncio.Event) -> None:
        self._app = app
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._asked.set()
        await self._app(scope, receive, send)
