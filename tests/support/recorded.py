"""Recordings made without a server: traces of any length, with texts that want to break pages."""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

from neuroscope_vllm.core.config import Redact
from neuroscope_vllm.core.events import (
    DoneEvent,
    Feature,
    RequestEvent,
    SteeredFeature,
    TokenEvent,
    encoder,
)
from neuroscope_vllm.core.recording.files import write_traces
from neuroscope_vllm.core.recording.record import About, Head, RecordedEvent, RecordedTrace
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.wire import Site

HOSTILE = (
    "</script><script>window.owned = 1</script>",
    "<img src=http://192.0.2.1/x onerror=owned=1>",
    "\u202eevil\u2066",
    "👩\u200d👩\u200d👧",
    "\x00\x1b[31m\r",
    "&amp;<b>'\"`${1}",
    "\u2028]]>-->",
    "",
)
"""Token texts that are no words; the last is half of a character."""
LONG = "long " * 2000
WORDS = ("the", "cat", "thought", "", "about", "rivers,", "capitals", "and", "你好", "grammar")
WIDTH = 16_384
EPOCH = "0badcafe"
STEP_S = 0.02
CREATED = 1_790_000_000.0


def label_of(index: int) -> str | None:
    """One is long, every eighth hostile; some have none."""
    if index == 16:
        return LONG
    if index % 8 == 0:
        return HOSTILE[index // 8 % len(HOSTILE)] or None
    return None if index % 8 == 1 else f"meaning {index}"


def make_trace(
    tokens: int = 200,
    *,
    request_id: str = "chatcmpl-recorded",
    layers: Sequence[int] = (20,),
    prompt: int = 40,
    choice: int = 0,
    seq: int = 0,
    began: float = CREATED,
    top_k: int = 8,
) -> RecordedTrace:
    """One finished choice of `tokens` tokens, `prompt` of them prompt; 50 tokens a second."""
    internal_id = f"{choice}_{request_id}-00c0ffee" if choice else f"{request_id}-00c0ffee"
    numbers = itertools.count(seq)
    events: list[RecordedEvent] = []

    def tell(name: str, layer: int | None, event: msgspec.Struct, time: float) -> None:
        events.append(
            RecordedEvent(name, layer, EPOCH, next(numbers), round(time, 6), encoder.encode(event))
        )

    started = RequestEvent(
        request_id, internal_id, choice, "recorded", prompt, began, list(layers), 0
    )
    tell("request", None, started, began)
    for position in range(tokens):
        generated = position - prompt
        for layer in layers:
            event = _token(request_id, internal_id, choice, position, prompt, layer, top_k)
            if position == tokens - 1:
                event.top_features, event.l0, event.features_at = [], None, None
                event.steered = []
            name = "prompt" if generated < 0 else "token"
            tell(name, layer, event, began + 0.1 + max(generated, 0) * STEP_S)
    done = DoneEvent(request_id, choice, "stop", prompt, tokens - prompt, 0, 0, internal_id)
    tell("done", None, done, began + 0.1 + (tokens - prompt) * STEP_S)
    head = Head(
        request_id=request_id,
        internal_id=internal_id,
        choice=choice,
        epoch=EPOCH,
        created=began,
        events_total=len(events),
        events=len(events),
        started=events[0].time,
        ended=events[-1].time,
    )
    return RecordedTrace(head, events)


def _token(
    request_id: str,
    internal_id: str,
    choice: int,
    position: int,
    prompt: int,
    layer: int,
    top_k: int,
) -> TokenEvent:
    in_prompt = position < prompt
    if position == 0:
        text, token_id = "<bos>", 2
    elif position % 17 == 5:
        text, token_id = HOSTILE[position // 17 % len(HOSTILE)], 300 + position % 17
    else:
        text = " " + WORDS[position * 7 % len(WORDS)] + ("\n" if position % 40 == 39 else "")
        token_id = 1000 + position * 7 % len(WORDS)
    first = position * 31 + layer
    best = (position * 13 % 90 + 10) / 7
    features = [
        Feature(
            index := (first + 101 * k) % (WIDTH if k % 2 else 64),
            label_of(index),
            float(f"{best / (k + 1):.6g}"),
            float(f"{best / (k + 2):.6g}"),
            index % 5 == 0,
            index % 9 == 0,
        )
        for k in range(top_k)
    ]
    sink = position == 0
    phase = "prompt" if in_prompt else None
    cached = in_prompt and position % 3 == 1
    steered = [SteeredFeature(7, 0.0, 40.5)] if position % 50 == 49 else []
    return TokenEvent(
        request_id, choice, None if in_prompt else position - prompt, position, text, token_id,
        layer, [] if sink else features, 20 + position % 100, "self",
        phase, cached, sink, internal_id, steered,
    )  # fmt: skip


def about(layers: Sequence[int] = (20,), top_k: int = 8, redact: Redact = "none") -> About:
    sae = SAEInfo(
        source="recorded", format="gemma-scope", architecture="jumprelu", d_model=64, width=WIDTH
    )
    sites = [
        Site(layer, sae, "activation", top_k, None, dense=list(range(0, WIDTH, 5)))
        for layer in layers
    ]
    return About(model="recorded", sites=sites, special_token_ids=[2], redact=redact)


def write_recorded(
    folder: Path,
    tokens: int = 200,
    *,
    request_id: str = "chatcmpl-recorded",
    layers: Sequence[int] = (20,),
    prompt: int = 40,
    redact: Redact = "none",
) -> RecordedTrace:
    """A recording of one request, which `neuroscope replay` can tell; returns its trace."""
    trace = make_trace(tokens, request_id=request_id, layers=layers, prompt=prompt)
    write_traces(folder, about(layers, redact=redact), [trace])
    return trace


@contextmanager
def replaying(recording: Path, *options: str, log: Path) -> Iterator[str]:
    """The base address of a `neuroscope replay`, which ends with Ctrl-C."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "replay", str(recording)]
    with log.open("w") as file:
        child = subprocess.Popen(
            [*words, "--features-port", str(port), *options], stdout=file, stderr=file
        )
    try:
        _wait_for(port, child, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.send_signal(signal.SIGINT)
        code = child.wait(20)
    assert code == 130, log.read_text()


def _wait_for(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    """Until it listens; a question would begin the replay."""
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def told_whole(base: str, request_id: str, timeout: float = 30.0) -> bytes:
    """What /v1/requests/{id} answers once all that it has is finished."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        answer = httpx.get(f"{base}/v1/requests/{request_id}", trust_env=False)
        if answer.status_code == 200 and b'"finished":false' not in answer.content:
            return answer.content
        time.sleep(0.05)
    raise AssertionError(f"{request_id} was not told")
