"""The engine of `neuroscope bench hub`: a process that makes token events at a steady rate.

As many requests run at once as there are readers, each after the other under the names
`bench-<slot>-<number>`. All that run step together, as in a batch. The time at which a row leaves
travels in its `l0`, which no hub looks at, so readers can tell how long it was on its way.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

import httpx
import msgspec
import numpy as np
import zmq
from tokenizers import Tokenizer

from neuroscope_vllm.cli.bench_shapes import TEXT
from neuroscope_vllm.core import events, wire
from neuroscope_vllm.engine.fake import FakeEngine, features_of, step_features

PROMPT_TOKENS = 16
OUTPUT_TOKENS = 64
RAMP_S = 1.0
"""Until all slots run."""
STARTS_UNDERWAY = 64
"""Requests that have begun and that the hub has not heard of yet: they fit the short queue of an
engine, which drops what does not. The next ones begin with a later step."""
PAUSE_S = 1.0
"""Between two requests of a slot, while its reader connects anew."""
TICK_S = 1e-5
"""Unit of the times in `l0`; 31 bits of it are six hours."""
LAYER, TOP_K = 20, 8
AHEAD_S = 1.0
"""How far the hub may be behind before the engine waits for it."""
POLL_S = 0.05


class Feed(msgspec.Struct):
    """What is fed to whom."""

    kind: str
    """`hub`, or `frames` for a broadcaster that is given ready-made events."""
    endpoint: str
    base: str
    """The receiver's HTTP address."""
    tokenizer_file: str
    slots: int
    events_per_second: float
    seconds: float
    origin: float
    """Monotonic time, the same in all processes of a machine, from which times are told."""


@dataclass
class Slot:
    """One request after the other."""

    number: int
    start_at: float
    outputs: int
    """Tokens that the next request generates."""
    events: int = 0
    """Published so far."""
    count: int = 0
    """Requests that have ended."""
    ids: list[int] = field(default_factory=list)
    """All tokens of the one that runs, prompt first; empty: none does."""
    sent: int = 0
    """How many of them are out."""

    @property
    def name(self) -> str:
        return f"bench-{self.number}-{self.count}"

    @property
    def end(self) -> int:
        """How many tokens are out after the next step: a prompt takes one, as each token does."""
        return self.sent + 1 if self.sent else PROMPT_TOKENS

    def begin(self, vocabulary: list[int]) -> None:
        draw = random.Random(self.name)
        self.ids = draw.choices(vocabulary, k=PROMPT_TOKENS + self.outputs)
        self.events += 1

    def step(self, pause: float) -> int:
        """Returns the tokens of the step."""
        tokens, self.sent = self.end - self.sent, self.end
        self.events += tokens
        if self.sent == len(self.ids):
            self.events += 1
            self.count, self.sent, self.ids = self.count + 1, 0, []
            self.outputs = OUTPUT_TOKENS
            self.start_at = time.monotonic() + pause
        return tokens


class Sink(Protocol):
    """Takes what the slots do."""

    @property
    def room(self) -> int:
        """How many requests may begin now."""
        ...

    def started(self, slot: Slot) -> None: ...
    def step(self, slots: list[Slot], stamp: int) -> None:
        """Each slot's tokens from `sent` to `end`."""
        ...

    def wait(self, rows: int) -> None:
        """Until the receiver is not too far behind."""
        ...

    def close(self) -> None: ...


class HubSink:
    """The shipped fake engine's two senders, and the hub's own count of what it has taken."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._engine = FakeEngine(feed.endpoint, layers=(LAYER,), top_k=TOP_K)
        self._rows = self._starts = self._rows_taken = self._starts_taken = 0
        self._wait_armed()
        self._closing = threading.Event()
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._poller.start()

    @property
    def room(self) -> int:
        return STARTS_UNDERWAY - (self._starts - self._starts_taken)

    def started(self, slot: Slot) -> None:
        self._engine.scheduler.put(
            wire.RequestStarted(
                internal_id=slot.name,
                request_id=slot.name,
                choice=0,
                engine="fake",
                dp_rank=0,
                prompt_token_ids=np.array(slot.ids[:PROMPT_TOKENS], "<i4").tobytes(),
                created=time.time(),
                layers=[LAYER],
            )
        )
        self._engine.scheduler.put(wire.RequestScheduled(slot.name, 0))
        self._starts += 1

    def step(self, slots: list[Slot], stamp: int) -> None:
        sampled, rows = [], {}
        for slot in slots:
            end = slot.end
            if slot.sent:
                one = wire.Sampled(slot.name, slot.ids[slot.sent : end])
                if end == len(slot.ids):
                    one.finish_reason = "length"
                sampled.append(one)
            if end < len(slot.ids):
                rows[slot.name] = [(at, slot.ids[at]) for at in range(slot.sent, end)]
        if sampled:
            self._engine.scheduler.put(wire.TokensSampled(sampled))
        if rows:
            message = step_features(rows, self._engine.layers, TOP_K)
            count = sum(map(len, rows.values()))
            message.layers[0].l0 = np.full(count, stamp, "<i4").tobytes()
            self._engine.worker.put(message)
            self._rows += count

    def wait(self, rows: int) -> None:
        while self._rows - self._rows_taken > rows:
            time.sleep(0.002)
            senders = (self._engine.scheduler, self._engine.worker)
            if dropped := sum(sender.counters["messages_dropped"] for sender in senders):
                sys.exit(
                    f"bench hub: {dropped} messages were dropped before they left the engine, whose"
                    " threads this machine did not run in time, so no books can be kept; end what"
                    " else runs here, or give a smaller load."
                )

    def close(self) -> None:
        self.wait(0)
        self._closing.set()
        self._poller.join()
        self._engine.close()

    def _wait_armed(self) -> None:
        with httpx.Client(base_url=self._feed.base, timeout=60) as client:
            while client.get("/health").status_code != 200:
                time.sleep(POLL_S)

    def _poll(self) -> None:
        with httpx.Client(base_url=self._feed.base, timeout=60) as client:
            while not self._closing.wait(POLL_S):
                with contextlib.suppress(httpx.HTTPError):
                    answer = client.get("/v1/features/describe").json()
                    self._rows_taken = answer["counters"].get("rows", 0)
                    self._starts_taken = answer["counters"].get("requests", 0)


class FrameSink:
    """The same events as a hub would tell, made here, so that the receiver only sends them on."""

    def __init__(self, feed: Feed) -> None:
        tokenizer = Tokenizer.from_file(feed.tokenizer_file)
        self._texts = [tokenizer.decode([at]) for at in range(tokenizer.get_vocab_size())]
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 4)  # then a step waits
        self._socket.connect(feed.endpoint)
        self._seq = 0
        self._frames: list[tuple[str, bytes]] = []

    @property
    def room(self) -> int:
        return STARTS_UNDERWAY

    def started(self, slot: Slot) -> None:
        self._tell(
            slot,
            "request",
            events.RequestEvent(
                slot.name, slot.name, 0, "fake", PROMPT_TOKENS, time.time(), [LAYER], 0
            ),
        )

    def step(self, slots: list[Slot], stamp: int) -> None:
        for slot in slots:
            end = slot.end
            for at in range(slot.sent, end):
                self._token(slot, at, stamp)
            if end == len(slot.ids):
                done = events.DoneEvent(
                    slot.name, 0, "length", PROMPT_TOKENS, slot.outputs, 0, 0, slot.name
                )
                self._tell(slot, "done", done)

    def wait(self, rows: int) -> None:
        """The socket's own short queues say how far behind it is."""
        self._socket.send(msgspec.msgpack.encode(self._frames))
        self._frames = []

    def close(self) -> None:
        self._socket.close(linger=5000)
        self._context.term()

    def _token(self, slot: Slot, at: int, stamp: int) -> None:
        token, prompt, last = slot.ids[at], at < PROMPT_TOKENS, at + 1 == len(slot.ids)
        features = [
            events.Feature(index, None, activation, activation / 2)
            for index, activation in features_of(token, at, LAYER, TOP_K)
        ]
        event = events.TokenEvent(
            request_id=slot.name,
            choice=0,
            token_index=None if prompt else at - PROMPT_TOKENS,
            position=at,
            token=self._texts[token],
            token_id=token,
            layer=LAYER,
            top_features=[] if last else features,
            l0=None if last else stamp,
            features_at=None if last else "self",
            phase="prompt" if prompt else None,
            internal_id=slot.name,
        )
        self._tell(slot, "prompt" if prompt else "token", event)

    def _tell(self, slot: Slot, name: str, event: msgspec.Struct) -> None:
        head = f"id: 00000000-{self._seq}\nevent: {name}\ndata: ".encode()
        self._frames.append((slot.name, b"%b%b\n\n" % (head, events.encoder.encode(event))))
        self._seq += 1


def run(feed: Feed) -> dict[str, object]:
    """{"events" published of each slot, "events_per_second" reached once all slots ran,
    "waited_share" of the time in which the receiver was too far behind with rows}."""
    sink: Sink = HubSink(feed) if feed.kind == "hub" else FrameSink(feed)
    vocabulary = Tokenizer.from_file(feed.tokenizer_file).encode(" ".join(TEXT)).ids
    cycle = feed.slots * (PROMPT_TOKENS + OUTPUT_TOKENS) / feed.events_per_second
    pause = min(PAUSE_S, cycle / 4)
    interval = (cycle - pause) / (OUTPUT_TOKENS + 1)
    began = due = time.monotonic()
    ends = began + feed.seconds
    slots = [_slot(i / feed.slots, i, began) for i in range(feed.slots)]
    told, waited, all_began = [(began, 0)], 0.0, None
    while True:
        now = time.monotonic()
        due_to_start = (slot for slot in slots if not slot.ids and slot.start_at <= now < ends)
        for slot in itertools.islice(due_to_start, max(sink.room, 0)):
            slot.begin(vocabulary)
            sink.started(slot)
        if all_began is None and all(slot.events for slot in slots):
            all_began = now
        running = [slot for slot in slots if slot.ids]
        if running:
            sink.step(running, int((time.monotonic() - feed.origin) / TICK_S))
            tokens = sum(slot.step(pause) for slot in running)
            told.append((now, told[-1][1] + tokens))
        elif now >= ends:
            break
        before = time.monotonic()
        sink.wait(max(int(AHEAD_S * feed.events_per_second), feed.slots))
        now = time.monotonic()
        waited += now - before
        due = max(due + interval, now)
        time.sleep(due - now)
    sink.close()
    return {
        "events": [slot.events for slot in slots],
        "events_per_second": round(_rate(told, all_began or began, ends), 1),
        "waited_share": round(waited / (time.monotonic() - began), 3),
    }


def _slot(share: float, number: int, began: float) -> Slot:
    """First requests are of all lengths, so that later ones do not end all at once."""
    return Slot(number, began + RAMP_S * share, max(1, int(OUTPUT_TOKENS * share)))


def _rate(told: list[tuple[float, int]], first: float, last: float) -> float:
    """Tokens a second between two times, or over all where that is less than half of it."""
    if last - first < (told[-1][0] - told[0][0]) / 2:
        first, last = told[0][0], told[-1][0]
    inside = [one for one in told if first <= one[0] <= last]
    (start, before), (end, after) = inside[0], inside[-1]
    return (after - before) / max(end - start, 1e-9)


def words(feed: Feed) -> list[str]:
    """The command that runs `feed` in a process of its own; it prints what `run` returns."""
    return [sys.executable, "-m", __name__, msgspec.json.encode(feed).decode()]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(msgspec.json.decode(sys.argv[1], type=Feed))) + "\n")
