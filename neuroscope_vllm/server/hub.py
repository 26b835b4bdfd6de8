"""The hub: engines in, subscribers out.

Lives on one event loop and does no I/O. `handle` takes wire messages, joins truth and features,
tells them as events, keeps the events and wakes the readers concerned; nothing here waits.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager

import msgspec
from tokenizers import Tokenizer

from neuroscope_vllm.core import events, wire
from neuroscope_vllm.core.config import Settings, parts_of
from neuroscope_vllm.core.labels import LabelSet
from neuroscope_vllm.server.commands import Commands
from neuroscope_vllm.server.join import Budget, Choice, Item, Join
from neuroscope_vllm.server.lags import Lags
from neuroscope_vllm.server.narrate import Named, Narrator
from neuroscope_vllm.server.prefix import PrefixCache
from neuroscope_vllm.server.readers import Readers
from neuroscope_vllm.server.rights import ALL, Rights
from neuroscope_vllm.server.rows import unpack
from neuroscope_vllm.server.senders import FORGOTTEN_AFTER_S, Sender, Senders
from neuroscope_vllm.server.shown import Shown
from neuroscope_vllm.server.stages import Stages
from neuroscope_vllm.server.subscribe import AllRequests, OneRequest
from neuroscope_vllm.server.traces import Event, Log, Trace, TraceStore

logger = logging.getLogger(__name__)

OPEN_SHARE = 0.75
"""Of `running_mb`, for the requests themselves; the rest is room for rows, and for answers."""
OPEN_BYTES, OPEN_COPIES = 6_000, 4
"""What a running choice costs: beside its prompt, and how many of the prompt are kept."""
GONE = "The engine went away while it ran this request."
MAX_ID = 4096
"""Characters of a request's ids. vLLM takes X-Request-Id of any length, and every event says it."""
PAUSED_S = 2.0
"""If so long passed between ticks, this process stood still, and has not read what was sent."""


class _Open:
    """A choice that runs."""

    __slots__ = ("bytes", "choice", "engine", "narrator", "since", "trace")

    def __init__(
        self, narrator: Narrator, choice: Choice, trace: Trace, size: int, now: float
    ) -> None:
        self.bytes = size
        self.since = now
        self.narrator = narrator
        self.choice = choice
        self.trace = trace
        self.engine = narrator.started.engine


class Hub:
    """Everything the side process knows."""

    def __init__(self, settings: Settings, model: str, tokenizer: Tokenizer | None = None) -> None:
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self.set_labels({})
        self.epoch = secrets.token_hex(4)
        self.senders = Senders()
        self.counters: Counter[str] = Counter()
        self.commands = Commands(self.counters)
        self.lags = Lags()
        self.parts = parts = parts_of(settings)
        self.traces = TraceStore(parts.traces, settings.trace_requests)
        self.ring = Log()
        self.prefixes = PrefixCache(parts.prefix)
        self.budget = Budget(parts.running)
        self.join = Join(self.prefixes, self.budget, self.counters)
        self._stages = Stages(self.budget, self.counters)
        self._open: dict[str, _Open] = {}
        self._readers = Readers(
            self.ring, self.traces, self.event_id, settings.max_readers, self.counters
        )
        self._ticked_at = time.monotonic()

    def handle(self, message: wire.Message, now: float | None = None) -> None:
        """Take one message. Raises ValueError on arrays that do not fit each other."""
        now = time.monotonic() if now is None else now
        match message:
            case wire.StepFeatures():
                for whole in self._stages.add(message, now):
                    self._on_features(whole, now)
            case wire.TokensSampled():
                for sampled in message.sampled:
                    self._on_sampled(sampled, now)
            case wire.RequestStarted():
                self._on_started(message, now)
            case wire.RequestScheduled():
                self._on_scheduled(message.internal_id, message.cached_tokens, now)
            case wire.SteeringChanged():
                self._on_steering_changed(message)
            case wire.Resync():
                self._on_resync(message, now)
            case wire.Hello():
                if not self.senders.admits(message):
                    self.counters["senders_refused"] += 1
                    return
                for lost in self.senders.hello(message, now):
                    self._engine_gone(lost, now)
            case wire.Goodbye():
                if gone := self.senders.goodbye(message.sender):
                    self._engine_gone(gone, now)
        self._readers.wake()

    def tick(self, now: float | None = None) -> None:
        """Do what is due by time; call a few times a second."""
        now = time.monotonic() if now is None else now
        if now - self._ticked_at > PAUSED_S:
            self.senders.excuse(now - self._ticked_at)
        self._ticked_at = now
        self.senders.forget(now)
        self._end_unheard(now)
        for partial in self._stages.tick(now):
            try:
                self._on_features(partial, now)
            except ValueError as error:
                self.malformed(error)
        for internal_id, items in self.join.tick(now):
            self._tell(internal_id, items, now)
        self._readers.wake()

    def malformed(self, error: Exception) -> None:
        """A message, or a part of one, is none of ours."""
        self.counters["messages_malformed"] += 1
        if self.counters["messages_malformed"] == 1:
            logger.warning("neuroscope: a malformed message from an engine: %s", error)

    def close(self, reason: str) -> None:
        """Say goodbye to every reader."""
        self._readers.close(reason)

    def event_id(self, seq: int) -> bytes:
        return b"%b-%d" % (self.epoch.encode(), seq)

    @property
    def readers(self) -> int:
        return len(self._readers)

    @property
    def readers_of_one(self) -> int:
        return self._readers.of_one

    # Readers

    def subscribe_all(self, after: int | None = None, rights: Rights = ALL) -> AllRequests:
        return self._readers.subscribe_all(after, rights)

    def follow(self) -> AllRequests:
        return self._readers.follow()

    def subscribe(self, name: str, after: int | None = None, rights: Rights = ALL) -> OneRequest:
        return self._readers.subscribe(name, after, rights)

    def place(self, rights: Rights) -> AbstractContextManager[None]:
        return self._readers.place(rights)

    def unsubscribe(self, reader: AllRequests | OneRequest, name: str | None = None) -> None:
        self._readers.unsubscribe(reader, name)

    def running(self, name: str, rights: Rights) -> list[tuple[str, str]]:
        """(internal id, engine) of the choices of this name that still run and one may read."""
        opened = (self._open.get(trace.internal_id) for trace in self.traces.find(name, rights))
        return [
            (one.narrator.started.internal_id, one.engine)
            for one in opened
            if one is not None and not one.choice.finished
        ]

    # Messages

    def _on_started(self, started: wire.RequestStarted, now: float, retold: bool = False) -> None:
        internal_id = started.internal_id
        if internal_id in self._open:
            self.counters["requests_started_twice"] += 1
            return
        if len(internal_id) > MAX_ID or len(started.request_id) > MAX_ID:
            self.counters["requests_refused"] += 1
            self.join.ignore(internal_id)
            return
        narrator = Narrator(started, self.model, self.shown, self.senders.dense, self.tokenizer)
        ids = internal_id, started.request_id, started.choice
        trace = Trace(*ids, started.created, started.secret)
        self.begin(trace)
        self.counters["requests"] += 1
        size = OPEN_BYTES + OPEN_COPIES * len(wire.encode(started))
        if self.budget.choices + size > self.budget.limit * OPEN_SHARE:
            self._refuse(narrator, trace, now)
            return
        self.budget.choices += size
        edited = started.edited_from, started.edit_salt
        items = self.join.start(internal_id, narrator.prompt_ids, started.prefix_root, *edited)
        choice = self.join.get(internal_id)
        assert choice is not None
        self._open[internal_id] = _Open(narrator, choice, trace, size, now)
        self._publish(trace, [narrator.request(retold)])
        self._tell(internal_id, items, now)

    def _refuse(self, narrator: Narrator, trace: Trace, now: float) -> None:
        """There is no room to follow it; it runs all the same."""
        self.counters["requests_refused"] += 1
        if self.counters["requests_refused"] == 1:
            logger.warning(
                "neuroscope: %d requests run, and there is no room to follow another; its readers"
                " get an error, and requests_refused counts. running_mb and memory_mb give more.",
                len(self._open),
            )
        why = f"{len(self._open)} requests run, and the hub has no room to follow this one."
        self._publish(trace, [narrator.request(), narrator.error(why), narrator.never_followed()])
        self.traces.finish(trace, now)
        self.counters["requests_done"] += 1
        self.join.ignore(trace.internal_id)

    def _end_unheard(self, now: float) -> None:
        """Requests of a scheduler that nobody knows (any more) will never end by themselves."""
        known = self.senders.schedulers(now)
        for opened in list(self._open.values()):
            if opened.engine not in known and now - opened.since > FORGOTTEN_AFTER_S:
                self._fail(opened, GONE, now)

    def _on_scheduled(self, internal_id: str, cached_tokens: int, now: float) -> None:
        if internal_id in self._open:
            self._tell(internal_id, self.join.scheduled(internal_id, cached_tokens), now)

    def _on_sampled(self, sampled: wire.Sampled, now: float) -> None:
        opened = self._open.get(sampled.internal_id)
        if opened is None:
            self.counters["tokens_of_unknown_request"] += len(sampled.token_ids)
            return
        if opened.choice.finished:
            self.counters["tokens_after_end"] += len(sampled.token_ids)
            return
        heard = opened.narrator.sampled_tokens
        if sampled.at is not None and sampled.at > heard:
            self.counters["tokens_missed"] += sampled.at - heard
            return  # out of place until a resync brings those before
        if sampled.at is not None and sampled.at < heard:
            new = sampled.token_ids[heard - sampled.at :]
            sampled = msgspec.structs.replace(sampled, token_ids=new)
        try:
            released = opened.narrator.hear(sampled)
            items = self.join.extend(
                sampled.internal_id,
                released.token_ids,
                released.finish_reason,
                now,
                sampled.computed_tokens,
            )
        except Exception:
            # Its tokenizer or its ids are broken; the other requests of the step are not.
            logger.exception("neuroscope: tokens of %s can not be told", sampled.internal_id)
            self._fail(opened, "Its tokens could not be decoded.", now)
            return
        self._tell(sampled.internal_id, items, now)

    def _on_resync(self, message: wire.Resync, now: float) -> None:
        """Messages of a scheduler were lost: catch up with what runs or lately ended."""
        self.counters["resyncs"] += 1
        told = {one.started.internal_id for one in message.live}
        for internal_id, opened in list(self._open.items()):
            if opened.engine == message.engine and internal_id not in told:
                self._fail(opened, "Its last tokens were lost on their way here.", now)
        for one in message.live:
            try:
                self._catch_up(one, now)
            except ValueError as error:
                self.malformed(error)

    def _catch_up(self, one: wire.Live, now: float) -> None:
        internal_id = one.started.internal_id
        if internal_id not in self._open:
            if self.join.ended(internal_id):
                return
            self._on_started(one.started, now, retold=True)
        self._catch_up_steering(one.started)
        if one.cached_tokens is not None:
            self._on_scheduled(internal_id, one.cached_tokens, now)
        if internal_id in self._open and not self._open[internal_id].choice.finished:
            sampled = wire.Sampled(
                internal_id,
                one.token_ids,
                one.finish_reason,
                one.stop_reason,
                at=0,
                computed_tokens=one.computed_tokens,
            )
            self._on_sampled(sampled, now)

    def _catch_up_steering(self, started: wire.RequestStarted) -> None:
        """The word that a choice is steered otherwise may have been lost."""
        opened, position = self._open.get(started.internal_id), started.edited_from
        if opened is None or position is None or opened.choice.is_edited_by(started.edit_salt):
            return
        self._steer(
            opened,
            wire.SteeringChanged(
                "",
                started.internal_id,
                position=position,
                salt=started.edit_salt,
                steering=started.steering,
            ),
        )

    def _steer(self, opened: _Open, changed: wire.SteeringChanged) -> None:
        assert changed.position is not None
        opened.choice.edit_from(changed.position, changed.salt)
        self._publish(opened.trace, [opened.narrator.steering(changed)])

    def _on_steering_changed(self, changed: wire.SteeringChanged) -> None:
        opened = self._open.get(changed.internal_id)
        if opened is not None and changed.error is None and changed.position is not None:
            self._steer(opened, changed)
        self.commands.answered(changed)

    def _on_features(self, message: wire.StepFeatures, now: float) -> None:
        rows = unpack(message)
        self.counters["rows"] += len(rows.positions)
        # A request's cached prefix may be what another one computes in this very step: that one's
        # rows begin at lower positions, so they go first.
        for span in sorted(message.spans, key=lambda s: rows.positions[s.start : s.start + 1]):
            items = self.join.add(span.internal_id, rows, span.start, span.stop, now)
            self._tell(span.internal_id, items, now)

    def _engine_gone(self, sender: Sender, now: float) -> None:
        """Without its scheduler a running request will never be heard of again."""
        if sender.hello.role != "scheduler":
            return
        for opened in list(self._open.values()):
            if opened.engine == sender.hello.engine:
                self._fail(opened, GONE, now)

    def _fail(self, opened: _Open, message: str, now: float) -> None:
        if opened.choice.finished:
            return
        internal_id = opened.trace.internal_id
        self._publish(opened.trace, [opened.narrator.error(message)])
        self.counters["requests_failed"] += 1
        self._tell(internal_id, self.join.extend(internal_id, [], "error", now), now)

    # Events

    def begin(self, trace: Trace) -> None:
        """Keep a choice from now on, and give it to the readers who wait for it."""
        self.traces.open(trace)
        self._readers.attach(trace)

    def retell(self, trace: Trace, event: Event) -> None:
        """Tell the next event of a recorded choice, with the id that it had; `done` ends it."""
        self._keep(trace, event)
        if event.name == "done":
            self.traces.finish(trace, time.monotonic())
        self._readers.touch(trace)
        self._readers.wake()

    def _tell(self, internal_id: str, items: list[Item], now: float) -> None:
        if not items:
            return
        opened = self._open[internal_id]
        self._publish(opened.trace, opened.narrator.tell(items, opened.choice))
        if opened.choice.ended:
            del self._open[internal_id]
            self.budget.choices -= opened.bytes
            self.traces.finish(opened.trace, now)
            self.counters["requests_done"] += 1

    def _publish(self, trace: Trace, named: Iterable[Named]) -> None:
        encode = events.encoder.encode
        for name, layer, struct in named:
            id_ = self.event_id(seq := self.ring.end)
            self._keep(trace, Event.make(seq, name, layer, id_, encode(struct), trace))
        self._readers.touch(trace)

    def _keep(self, trace: Trace, event: Event) -> None:
        self.ring.append(event)
        self.traces.append(trace, event)
        while self.ring.bytes > self.parts.ring:
            self.ring.drop_oldest()

    def set_labels(self, labels: dict[int, list[LabelSet]]) -> None:
        """Label sets by layer, in order of preference."""
        self.labels = labels
        self.shown = Shown(labels)
