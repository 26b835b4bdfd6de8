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

import msgspec
from tokenizers import Tokenizer

from neuroscope_vllm.core import events, wire
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.labels import LabelSet
from neuroscope_vllm.server.commands import Commands
from neuroscope_vllm.server.join import Choice, Item, Join
from neuroscope_vllm.server.narrate import Named, Narrator
from neuroscope_vllm.server.prefix import PrefixCache
from neuroscope_vllm.server.rows import unpack
from neuroscope_vllm.server.senders import Sender, Senders
from neuroscope_vllm.server.stages import Stages
from neuroscope_vllm.server.subscribe import AllRequests, OneRequest
from neuroscope_vllm.server.traces import Event, Log, Trace, TraceStore

logger = logging.getLogger(__name__)

RING_SHARE = 0.25
PREFIX_SHARE = 0.25
"""Parts of the memory ceiling for the stream of all requests and for the features of token
prefixes; the traces have the rest."""


PAUSED_S = 2.0
"""If so long passed between ticks, this process stood still, and has not read what was sent."""


class _Open:
    """A choice that runs."""

    __slots__ = ("choice", "engine", "narrator", "trace")

    def __init__(self, narrator: Narrator, choice: Choice, trace: Trace) -> None:
        self.narrator = narrator
        self.choice = choice
        self.trace = trace
        self.engine = narrator.started.engine


class Hub:
    """Everything the side process knows."""

    def __init__(
        self,
        settings: Settings,
        model: str,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self.labels: dict[int, list[LabelSet]] = {}
        self.epoch = secrets.token_hex(4)
        self.senders = Senders()
        self.counters: Counter[str] = Counter()
        self.commands = Commands()
        memory = settings.memory_mb * 2**20
        self._ring_bytes = int(memory * RING_SHARE)
        prefix_bytes = int(memory * PREFIX_SHARE)
        self.traces = TraceStore(memory - self._ring_bytes - prefix_bytes, settings.trace_requests)
        self.ring = Log()
        self.prefixes = PrefixCache(prefix_bytes)
        self.join = Join(self.prefixes)
        self._stages = Stages()
        self._label_texts: dict[int, dict[int, str]] = {}
        self._unreliable: dict[int, frozenset[int]] = {}
        self._open: dict[str, _Open] = {}
        self._everything: set[AllRequests] = set()
        self._by_name: dict[str, set[OneRequest]] = {}
        self._touched: set[OneRequest] = set()
        self._wake_all = False
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
                for lost in self.senders.hello(message, now):
                    self._engine_gone(lost, now)
            case wire.Goodbye():
                if gone := self.senders.goodbye(message.sender):
                    self._engine_gone(gone, now)
        self._wake()

    def tick(self, now: float | None = None) -> None:
        """Do what is due by time; call a few times a second."""
        now = time.monotonic() if now is None else now
        if now - self._ticked_at > PAUSED_S:
            self.senders.excuse(now - self._ticked_at)
        self._ticked_at = now
        for gone in self.senders.forget(now):
            self._engine_gone(gone, now)
        for partial in self._stages.tick(now):
            self._on_features(partial, now)
        for internal_id, items in self.join.tick(now):
            self._tell(internal_id, items, now)
        self._wake()

    def close(self, reason: str) -> None:
        """Say goodbye to every reader."""
        for reader in [
            *self._everything,
            *(one for many in self._by_name.values() for one in many),
        ]:
            reader.close(reason)

    def event_id(self, seq: int) -> bytes:
        return b"%b-%d" % (self.epoch.encode(), seq)

    @property
    def readers(self) -> int:
        return len(self._everything) + sum(map(len, self._by_name.values()))

    # Readers

    def subscribe_all(self, after: int | None = None) -> AllRequests:
        reader = AllRequests(self.ring, self.event_id, self.counters, after)
        self._everything.add(reader)
        return reader

    def subscribe(self, name: str, after: int | None = None) -> OneRequest:
        reader = OneRequest(self.event_id, self.counters, after)
        for trace in self.traces.find(name):
            reader.attach(trace)
        self._by_name.setdefault(name, set()).add(reader)
        return reader

    def unsubscribe(self, reader: AllRequests | OneRequest, name: str | None = None) -> None:
        if isinstance(reader, AllRequests):
            self._everything.discard(reader)
            return
        assert name is not None
        readers = self._by_name.get(name, set())
        readers.discard(reader)
        if not readers:
            self._by_name.pop(name, None)

    def running(self, name: str) -> list[tuple[str, str]]:
        """(internal id, engine) of the choices of this name that still run."""
        opened = (self._open.get(trace.internal_id) for trace in self.traces.find(name))
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
        narrator = Narrator(
            started, self.model, self.label_of, self.unreliable, self.senders.dense, self.tokenizer
        )
        trace = Trace(internal_id, started.request_id, started.choice, started.created)
        self.begin(trace)
        items = self.join.start(
            internal_id,
            narrator.prompt_ids,
            started.prefix_root,
            started.edited_from,
            started.edit_salt,
        )
        choice = self.join.get(internal_id)
        assert choice is not None
        self._open[internal_id] = _Open(narrator, choice, trace)
        self.counters["requests"] += 1
        self._publish(trace, [narrator.request(retold)])
        self._tell(internal_id, items, now)

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
            sampled = msgspec.structs.replace(
                sampled, token_ids=sampled.token_ids[heard - sampled.at :]
            )
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
            gone = opened.engine == message.engine and internal_id not in told
            if gone and not opened.choice.finished:
                self._fail(opened, "Its last tokens were lost on their way here.", now)
        for one in message.live:
            internal_id = one.started.internal_id
            if internal_id not in self._open:
                if self.join.ended(internal_id):
                    continue
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
            if opened.engine == sender.hello.engine and not opened.choice.finished:
                self._fail(opened, "The engine went away while it ran this request.", now)

    def _fail(self, opened: _Open, message: str, now: float) -> None:
        started = opened.narrator.started
        error = events.ErrorBody(message, "server_error")
        event = events.ErrorEvent(started.request_id, started.choice, error, started.internal_id)
        self._publish(opened.trace, [("error", None, event)])
        self.counters["requests_failed"] += 1
        self._tell(
            started.internal_id, self.join.extend(started.internal_id, [], "error", now), now
        )

    # Events

    def begin(self, trace: Trace) -> None:
        """Keep a choice from now on, and give it to the readers who wait for it."""
        self.traces.open(trace)
        for name in trace.aliases:
            for reader in self._by_name.get(name, ()):
                reader.attach(trace)

    def retell(self, trace: Trace, event: Event) -> None:
        """Tell the next event of a recorded choice, with the id that it had; `done` ends it."""
        self._keep(trace, event)
        if event.name == "done":
            self.traces.finish(trace, time.monotonic())
        self._touch(trace)
        self._wake()

    def _tell(self, internal_id: str, items: list[Item], now: float) -> None:
        if not items:
            return
        opened = self._open[internal_id]
        self._publish(opened.trace, opened.narrator.tell(items, opened.choice))
        if opened.choice.ended:
            del self._open[internal_id]
            self.traces.finish(opened.trace, now)
            self.counters["requests_done"] += 1

    def _publish(self, trace: Trace, named: Iterable[Named]) -> None:
        ring, encode = self.ring, events.encoder.encode
        prefix = self.epoch.encode()
        for name, layer, struct in named:
            seq = ring.end
            id_ = b"%b-%d" % (prefix, seq)
            self._keep(trace, Event.make(seq, name, layer, id_, encode(struct), trace))
        self._touch(trace)

    def _keep(self, trace: Trace, event: Event) -> None:
        self.ring.append(event)
        self.traces.append(trace, event)
        while self.ring.bytes > self._ring_bytes:
            self.ring.drop_oldest()

    def _touch(self, trace: Trace) -> None:
        self._wake_all = True
        for name in trace.aliases:
            if readers := self._by_name.get(name):
                self._touched |= readers

    def _wake(self) -> None:
        if self._wake_all:
            for reader in self._everything:
                reader.wake()
            self._wake_all = False
        if self._touched:
            for reader in self._touched:
                reader.wake()
            self._touched.clear()

    def set_labels(self, labels: dict[int, list[LabelSet]]) -> None:
        """Label sets by layer; of a layer's sets the first that knows a feature names it."""
        self.labels = labels
        shown = {
            layer: {label.index: label for one in reversed(sets) for label in one}
            for layer, sets in labels.items()
        }
        self._label_texts = {
            layer: {index: label.text for index, label in of.items()} for layer, of in shown.items()
        }
        self._unreliable = {
            layer: frozenset(index for index, label in of.items() if label.unreliable)
            for layer, of in shown.items()
        }

    def label_of(self, layer: int, index: int) -> str | None:
        texts = self._label_texts.get(layer)
        return None if texts is None else texts.get(index)

    def unreliable(self, layer: int) -> frozenset[int]:
        """Features of a layer whose label, the one that `label_of` gives, is unreliable."""
        return self._unreliable.get(layer, frozenset())
