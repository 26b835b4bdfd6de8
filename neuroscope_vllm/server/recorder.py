"""Writes finished requests to a folder, where the settings ask for it.

On the event loop the recorder is one more reader of the stream: it notes when each event was told,
and at a choice's `done` takes the whole trace, as /v1/requests/{id} would give it, so that what a
slow reader misses it still has. Files are made and written by a thread. Between the two stands a
queue that is bounded in bytes: the hub never waits for a disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import queue
import re
import threading
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from neuroscope_vllm.core.detokenize import special_ids
from neuroscope_vllm.core.launch import SideConfig
from neuroscope_vllm.core.recording import folder as folders
from neuroscope_vllm.core.recording.files import file_content
from neuroscope_vllm.core.recording.record import About, Head, RecordedEvent, RecordedTrace
from neuroscope_vllm.core.recording.rows import chunks, to_batch
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.traces import Event, Trace

logger = logging.getLogger(__name__)

BATCH_EVENTS = 1024
REST_S = 0.005
"""Between two looks at the stream, which is how exact the times are."""
QUEUE_SHARE = 0.125
"""Of the hub's memory, and besides it: finished requests that wait for the writer."""
FILE_BYTES = 8 << 20
"""Events of a file, as JSON."""
FILE_S = 60.0
"""After which a request is on disk; what a crash may lose."""
BREATH_S = 0.001
"""The writer's pause after each few events: the hub's turn, which needs the same interpreter."""
TIDY_S = 3600.0
CLOSE_S = 3.0
_CHOICE = re.compile(r"^\d+_")


class _Finished(NamedTuple):
    """A choice to write. `times` are of its last events, unix seconds."""

    trace: Trace
    events: list[Event]
    times: list[float]
    about: About
    bytes: int


def chosen(internal_id: str, rate: float) -> bool:
    """Whether a request is among the share `rate`: all its choices or none, and always the same."""
    digest = hashlib.sha256(_CHOICE.sub("", internal_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") < rate * 2**64


class Recorder:
    """Follows a hub from `start` to `close`. Counts in the hub's counters: `record_requests` that
    were written, `_skipped` as not sampled, `_dropped` before the writer came to them, `_failed` to
    be written."""

    def __init__(self, hub: Hub, config: SideConfig) -> None:
        settings = config.settings
        assert settings.record is not None
        self._hub = hub
        self._rate = settings.record_rate
        self._about = About(
            model=config.model, model_source=config.model_source, redact=settings.record_redact
        )
        self._times: dict[Trace, array[float] | None] = {}  # None: not sampled
        self._seen = -1
        # Unix time that no adjustment of the clock turns back.
        self._clock = time.time() - time.monotonic()
        for name in ("", "_skipped", "_dropped", "_failed"):
            hub.counters[f"record_requests{name}"] += 0  # the writer adds no keys while others read
        self._writer = Writer(
            Path(settings.record).expanduser().absolute(),
            hub.epoch,
            settings.record_days,
            int(settings.memory_mb * 2**20 * QUEUE_SHARE),
            hub.counters,
        )

    def start(self) -> None:
        self._reader = self._hub.follow()
        self._writer.start()
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Write what has finished; takes at most CLOSE_S."""
        self._task.cancel()
        self._take()
        await asyncio.to_thread(self._writer.close)

    async def _follow(self) -> None:
        while True:
            self._take()
            await self._reader.wait()
            await asyncio.sleep(REST_S)

    def _take(self) -> None:
        now = time.monotonic() + self._clock
        lost_after = None
        while batch := self._reader.take(BATCH_EVENTS):
            for event in batch:
                if event.trace is None:  # to this reader alone: a gap, or goodbye
                    if event.name == "gap":
                        lost_after = self._seen
                    continue
                if lost_after is not None:
                    self._catch_up(lost_after, event.seq)
                    lost_after = None
                self._seen = event.seq
                self._note(event, event.trace, now)
        if lost_after is not None:
            self._catch_up(lost_after, self._hub.ring.end)

    def _note(self, event: Event, trace: Trace, now: float) -> None:
        if trace not in self._times:
            self._times[trace] = array("d") if chosen(trace.internal_id, self._rate) else None
        times = self._times[trace]
        if times is not None:
            times.extend([now] * (event.at + 1 - len(times)))
        if event.name == "done":
            self._finish(trace)

    def _catch_up(self, after: int, before: int) -> None:
        """More was told at once than is kept for readers: find what ended in between."""
        kept = set(self._hub.traces)
        for trace in kept:
            last = trace.get(trace.end - 1)
            if trace.finished_at is not None and last is not None and after < last.seq < before:
                self._note(last, trace, time.monotonic() + self._clock)
        for trace in self._times.keys() - kept:
            self._finish(trace)

    def _finish(self, trace: Trace) -> None:
        times = self._times.pop(trace)
        if times is None:
            self._hub.counters["record_requests_skipped"] += 1
            return
        size = trace.bytes
        events = trace.read(trace.first, trace.end - trace.first)
        whole = bool(events) and events[-1].name == "done"
        about = self._what_served()
        taken = whole and self._writer.put(
            _Finished(trace, events, list(times[-len(events) :]), about, size)
        )
        if not taken:
            self._hub.counters["record_requests_dropped"] += 1

    def _what_served(self) -> About:
        """The same object until something changes."""
        hub, old = self._hub, self._about
        sites, special = hub.senders.sites(), special_ids(hub.tokenizer)
        if sites and (sites != old.sites or special != old.special_token_ids):
            self._about = About(
                model=old.model,
                model_source=old.model_source,
                sites=sites,
                special_token_ids=special,
                redact=old.redact,
            )
        return self._about


@dataclass
class _File:
    """What the next file will hold."""

    about: About
    due: float
    heads: list[Head] = field(default_factory=list)
    batches: list[pa.RecordBatch] = field(default_factory=list)
    bytes: int = 0


class Writer:
    """The thread. Takes traces by `put`, until `close`."""

    def __init__(
        self, folder: Path, epoch: str, days: int, max_bytes: int, counters: Counter[str]
    ) -> None:
        self._folder = folder
        self._epoch = epoch
        self._days = days
        self._max_bytes = max_bytes
        self._counters = counters
        self._queue: queue.SimpleQueue[_Finished | None] = queue.SimpleQueue()
        self._put_bytes = 0  # of the loop
        self._done_bytes = 0  # of the thread
        self._file: _File | None = None
        self._number = 0
        self._ill = False
        self._tidy_at = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="neuroscope-recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, one: _Finished) -> bool:
        """False: too much waits already. The last one may be of any size, or long ones never went
        in."""
        if self._put_bytes - self._done_bytes >= self._max_bytes:
            return False
        self._put_bytes += one.bytes
        self._queue.put(one)
        return True

    def close(self) -> None:
        """Write what waits, in CLOSE_S."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning(
                "neuroscope: the disk of %s was too slow to write what ended last; it is lost.",
                self._folder,
            )

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            if now >= self._tidy_at:
                self._tidy_at = now + TIDY_S
                self._tidy()
            due = self._file.due if self._file else self._tidy_at
            try:
                one = self._queue.get(timeout=max(0.0, min(due, self._tidy_at) - now))
            except queue.Empty:
                self._write()
                continue
            if one is None:
                self._write()
                return
            self._add(one)
            self._done_bytes += one.bytes
            if self._file and (self._file.bytes >= FILE_BYTES or now >= self._file.due):
                self._write()

    def _add(self, one: _Finished) -> None:
        if self._file is not None and self._file.about is not one.about:
            self._write()
        if self._file is None:
            self._file = _File(one.about, time.monotonic() + FILE_S)
        try:
            trace = _recorded(one)
            batches = []
            for events in chunks(trace.events):
                batches.append(to_batch(trace.head, events, one.about.redact))
                if not self._closing.is_set():
                    time.sleep(BREATH_S)
        except Exception:
            # One request that can not be recorded must not end the recording.
            self._counters["record_requests_failed"] += 1
            logger.exception("neuroscope: %s can not be recorded", one.trace.internal_id)
            return
        self._file.heads.append(trace.head)
        self._file.batches += batches
        self._file.bytes += one.bytes

    def _write(self) -> None:
        """The file that is due, if there is something for it."""
        file, self._file = self._file, None
        if file is None or not file.heads:
            return
        self._number += 1
        path = folders.day_file(self._folder, self._epoch, self._number, time.time())
        try:
            folders.write_private(path, file_content(file.about, file.heads, file.batches))
        except (OSError, pa.ArrowException) as error:
            self._counters["record_requests_failed"] += len(file.heads)
            self._warn(error)
            return
        self._counters["record_requests"] += len(file.heads)
        if self._ill:
            self._ill = False
            logger.warning("neuroscope: requests are recorded in %s again.", self._folder)

    def _tidy(self) -> None:
        try:
            folders.forget(self._folder, self._days, time.time())
        except OSError as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Once, until it is well again."""
        if not self._ill:
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning(
                "neuroscope: requests can not be recorded in %s (%s); those of now are lost, and"
                " counted in record_requests_failed. The stream goes on.",
                self._folder,
                reason,
            )
        self._ill = True


def _recorded(one: _Finished) -> RecordedTrace:
    trace, events = one.trace, one.events
    recorded = []
    for event, at in zip(events, one.times, strict=True):
        assert event.id is not None
        epoch, _, seq = event.id.decode().rpartition("-")
        recorded.append(RecordedEvent(event.name, event.layer, epoch, int(seq), at, event.json))
    head = Head(
        request_id=trace.request_id,
        internal_id=trace.internal_id,
        choice=trace.choice,
        epoch=recorded[0].epoch,
        created=trace.created,
        events_total=events[-1].at + 1,
        events=len(events),
        started=one.times[0],
        ended=one.times[-1],
        secret=trace.secret,
    )
    return RecordedTrace(head, recorded)
