"""A deterministic engine without a model: it speaks the wire to a hub as a real one does.

For tests of the side process, and for work on the page. A scheduler and a worker sender run on
their own sockets. Features are a function of token id and position (`features_of`), so a reader
can check each one. What real engines do to rows (chunks, rejected drafts, replays after
preemption, prefix-cache hits, rows that outrun their truth) is asked for per request.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.access import digest
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sender import Sender

WIDTH = 16_384
DENSE = list(range(0, WIDTH, 5))


def features_of(token_id: int, position: int, layer: int, top_k: int) -> list[tuple[int, float]]:
    """(index, activation) of a token's features, best first."""
    index, activation = _features(np.array([token_id]), np.array([position]), layer, top_k)
    return list(zip(index[0].tolist(), activation[0].tolist(), strict=True))


def _features(
    token_ids: NDArray[np.int64], positions: NDArray[np.int64], layer: int, top_k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The same of n tokens: (index, activation), each [n, top_k]."""
    first = (token_ids * 31 + positions * 7 + layer)[:, None]
    k = np.arange(top_k)
    return (first + 101 * k) % WIDTH, (first % 90 + 10) / (k + 1)


def l0_of(token_id: int) -> int:
    return 20 + token_id % 100


def step_features(
    rows: dict[str, Sequence[tuple[int, int]]], layers: Sequence[int], top_k: int
) -> wire.StepFeatures:
    """One message with the (position, token id) rows of each internal id."""
    flat = np.array([row for span in rows.values() for row in span], np.int64).reshape(-1, 2)
    positions, token_ids = flat[:, 0], flat[:, 1]
    ends = np.cumsum([len(span) for span in rows.values()]).tolist()
    spans = [
        wire.Span(name, end - len(span), end)
        for (name, span), end in zip(rows.items(), ends, strict=True)
    ]
    return wire.StepFeatures(
        engine="fake",
        spans=spans,
        positions=positions.astype("<i4").tobytes(),
        token_ids=token_ids.astype("<i4").tobytes(),
        layers=[_layer(token_ids, positions, layer, top_k) for layer in layers],
        step=0,
        num_layers=len(layers),
    )


def _layer(
    token_ids: NDArray[np.int64], positions: NDArray[np.int64], layer: int, top_k: int
) -> wire.LayerFeatures:
    index, activation = _features(token_ids, positions, layer, top_k)
    return wire.LayerFeatures(
        layer=layer,
        top_k=top_k,
        index=index.astype("<i4").tobytes(),
        activation=activation.astype("<f4").tobytes(),
        score=(activation / 2).astype("<f4").tobytes(),
        l0=(20 + token_ids % 100).astype("<i4").tobytes(),
        sink=(positions == 0).astype(np.uint8).tobytes(),
    )


@dataclass(frozen=True, kw_only=True)
class Script:
    """How a request runs.

    chunk: prompt rows per step. cached: prompt tokens from the prefix cache. drafts: after each
    generated token the worker also runs this many drafts that get rejected. preempt_at: after
    this many output tokens all rows so far run again. features_first: worker messages leave
    before the scheduler's. lost: positions whose rows never leave. pause_s: time between steps.
    abort: it ends as one whose client left, or whose stop string vLLM's front end saw.
    secret: its stream secret. traceparent: the client's trace context. tag: every generated token
    meets a rule of this tag.
    """

    chunk: int = 1 << 30
    cached: int = 0
    drafts: int = 0
    preempt_at: int | None = None
    features_first: bool = False
    lost: frozenset[int] = frozenset()
    pause_s: float = 0.0
    finish_reason: str | None = "length"
    stop_reason: int | str | None = None
    stop: tuple[str, ...] = ()
    choice: int = 0
    abort: bool = False
    traceparent: str | None = None
    tag: str | None = None
    secret: str | None = None


PLAIN = Script()


class Ids(NamedTuple):
    """A request to run."""

    internal_id: str
    request_id: str
    prompt: list[int]
    output: list[int]


def messages(
    ids: Ids, script: Script, layers: Sequence[int] = (20,), top_k: int = 8
) -> Iterator[wire.Message]:
    """What both senders say of one choice, in the order it happens."""
    context = [*ids.prompt, *ids.output]

    def rows(start: int, stop: int) -> wire.StepFeatures:
        stand = [(p, context[p]) for p in range(start, stop) if p not in script.lost]
        wrong = [(stop + d, context[stop] + 1) for d in range(script.drafts) if stop < len(context)]
        step = step_features({ids.internal_id: stand + wrong}, layers, top_k)
        if script.tag is not None:
            step.hits = [
                _hit(row, position, token_id, layers[0], script.tag)
                for row, (position, token_id) in enumerate(stand)
                if position >= len(ids.prompt)
            ]
        return step

    started = wire.RequestStarted(
        internal_id=ids.internal_id,
        request_id=ids.request_id,
        choice=script.choice,
        engine="fake",
        dp_rank=0,
        prompt_token_ids=np.array(ids.prompt, "<i4").tobytes(),
        created=time.time(),
        layers=sorted(layers),
        stop=list(script.stop),
        traceparent=script.traceparent,
        secret=digest(script.secret) if script.secret else None,
    )
    scheduled = wire.RequestScheduled(ids.internal_id, script.cached)
    if not script.features_first:
        yield from (started, scheduled)
    for start in range(script.cached, len(ids.prompt), script.chunk):
        yield rows(start, min(start + script.chunk, len(ids.prompt)))
    if script.features_first:
        yield from (started, scheduled)
    for at, token_id in enumerate(ids.output):
        end = len(ids.prompt) + at + 1
        sampled = wire.Sampled(ids.internal_id, [token_id])
        if end == len(context) and not script.abort:
            sampled.finish_reason, sampled.stop_reason = script.finish_reason, script.stop_reason
        truth = wire.TokensSampled([sampled])
        # The step after the last token is the one vLLM runs in vain when it schedules ahead.
        step = rows(end - 1, end)
        yield from (step, truth) if script.features_first else (truth, step)
        if script.preempt_at == at:
            yield rows(0, end)
    if script.abort:
        yield wire.TokensSampled([wire.Sampled(ids.internal_id, [], "abort")])


def _hit(row: int, position: int, token_id: int, layer: int, tag: str) -> wire.RuleHit:
    index, activation = features_of(token_id, position, layer, 1)[0]
    return wire.RuleHit(row, layer, index, activation, rule="watch", tag=tag)


class FakeEngine:
    """A scheduler and a worker, connected to the hub at `endpoint` until closed."""

    def __init__(
        self, endpoint: str, *, layers: Sequence[int] = (20,), top_k: int = 8, armed: bool = True
    ) -> None:
        self.layers = tuple(layers)
        self.top_k = top_k
        self._armed = armed
        self._lock = threading.Lock()
        self._requests = 0
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._counters: Counter[str] = Counter()
        self.scheduler = Sender(endpoint, lambda counters: self._hello("scheduler", counters))
        self.worker = Sender(
            endpoint, lambda counters: self._hello("worker", {**counters, **self._counters})
        )
        self.scheduler.start()
        self.worker.start()

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()

    def run(
        self, request_id: str, prompt: Sequence[int], output: Sequence[int], script: Script = PLAIN
    ) -> str:
        """Run one choice of a request to its end; returns its internal id."""
        with self._lock:
            self._requests += 1
            internal_id = f"{request_id}-{self._requests:08x}"
        ids = Ids(internal_id, request_id, list(prompt), list(output))
        self._count(0, lost=len(script.lost))
        for message in messages(ids, script, self.layers, self.top_k):
            is_features = isinstance(message, wire.StepFeatures)
            if isinstance(message, wire.StepFeatures):
                self._count(len(message.positions) // 4)
            (self.worker if is_features else self.scheduler).put(message)
            if script.pause_s and is_features:
                time.sleep(script.pause_s)
        return internal_id

    def _count(self, rows: int, lost: int = 0) -> None:
        """As a worker that drops the steps of the rows that are lost."""
        with self._lock:
            self._counters["steps"] += rows > 0
            self._counters["rows_observed"] += rows + lost
            self._counters["rows_encoded"] += rows
            self._counters["rows_dropped"] += lost

    def _hello(self, role: str, counters: dict[str, int]) -> wire.Hello:
        sae = SAEInfo(
            source="fake", format="gemma-scope", architecture="jumprelu", d_model=64, width=WIDTH
        )
        sites = [
            wire.Site(layer, sae, "activation", self.top_k, None, dense=DENSE)
            for layer in self.layers
        ]
        return wire.Hello(
            sender=f"fake-{role}-{self._name}",
            role=role,
            engine="fake",
            dp_rank=0,
            model="fake",
            armed=self._armed,
            host=socket.gethostname(),
            device="cpu" if role == "worker" else "",
            runner="v1",
            sites=sites if role == "worker" else [],
            counters=counters,
        )
