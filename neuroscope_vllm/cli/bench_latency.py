"""The measurement behind `neuroscope bench latency`: from a chat's chunk to its feature event.

A token's features are those of the forward pass that reads it, and that pass gives the next token.
So the event of token i can not come before its own chunk plus one step of the model, and two
times are told: from the chunk of token i, which is what a reader waits, and from the chunk of
token i + 1, which left the same forward pass, and is what observing and streaming take.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import click
import httpx
from rich.progress import Progress
from rich.table import Table

from neuroscope_vllm.cli.bench_report import Report
from neuroscope_vllm.cli.bench_stamped import Refused, Stamped, ask
from neuroscope_vllm.cli.supervise import console

CHAT_TIMEOUT_S = 600
STREAM_END_S = 20
"""How long a stream may go on after its chat is complete; the hub waits 2 s for late rows."""
PROMPT = "Tell me a long story about a small town by the sea."
QUANTILES = (50, 90, 99)


@dataclass
class Times:
    """In ms, over all tokens of a batch size."""

    wait: list[float] = field(default_factory=list)
    """From a token's chunk to its event; negative where the event came first."""
    same_pass: list[float] = field(default_factory=list)
    """From the next token's chunk, of the same forward pass."""
    between: list[float] = field(default_factory=list)
    """From one chunk of a request to the next."""


def measure(
    url: str,
    features: str,
    batches: tuple[int, ...],
    tokens: int,
    rounds: int,
    api_key: str | None,
) -> Report:
    """{"rows": [one per batch size], "tokens", "rounds"}. Raises click.ClickException."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=10).raise_for_status()
        model = answer.json()["data"][0]["id"]
        rows = []
        with Progress(console=console) as progress:
            task = progress.add_task("measuring", total=len(batches) * rounds)
            for batch in batches:
                asyncio.run(_round(url, features, model, batch, tokens, headers))
                times = Times()
                for _ in range(rounds):
                    answers = asyncio.run(_round(url, features, model, batch, tokens, headers))
                    for chat, stream in answers:
                        _compare(chat, stream, times)
                    progress.advance(task)
                rows.append(_row(batch, times))
    except (OSError, httpx.HTTPError, Refused, TimeoutError) as error:
        raise click.ClickException(
            f"no latency can be measured at {url} and {features}"
            f" ({error or type(error).__name__}); give the addresses of a running server and of"
            " its features, and its key with --api-key if it has one."
        ) from None
    return {"rows": rows, "tokens": tokens, "rounds": rounds, "model": model}


async def _round(
    url: str, features: str, model: str, batch: int, tokens: int, headers: dict[str, str]
) -> list[tuple[Stamped, Stamped]]:
    """(chat, stream) of `batch` requests at once, each stream open before its chat is sent."""
    run = secrets.token_hex(4)
    names = [f"latency-{run}-{i}" for i in range(batch)]
    streams = [
        await ask(f"{features}/v1/features/stream?{urlencode({'request_id': one})}", None, headers)
        for one in names
    ]
    await asyncio.gather(*(stream.heard for stream in streams))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    asked = (
        ask(f"{url}/v1/chat/completions", body, {**headers, "X-Request-Id": one}) for one in names
    )
    chats = await asyncio.gather(*asked)
    await asyncio.wait_for(asyncio.gather(*(chat.ended for chat in chats)), CHAT_TIMEOUT_S)
    await asyncio.wait_for(asyncio.gather(*(one.ended for one in streams)), STREAM_END_S)
    return list(zip(chats, streams, strict=True))


def _compare(chat: Stamped, stream: Stamped, times: Times) -> None:
    """Raises Refused, also where the answer has no token ids."""
    chunks: list[float] = []
    for when, _, chunk in chat.events():
        if "error" in chunk:
            raise Refused(f"broke off: {chunk['error'].get('message')}")
        for choice in chunk["choices"]:
            chunks += [when] * len(choice.get("token_ids") or ())
    if not chunks:
        raise Refused("was answered without token ids (return_token_ids)")
    # With several layers a token's features are there when the last of them is.
    events: dict[int, float] = defaultdict(float)
    for when, name, event in stream.events():
        if name == "token" and event["features_at"] == "self":
            events[event["token_index"]] = max(events[event["token_index"]], when)
    for index, when in events.items():
        if index + 1 < len(chunks):
            times.wait.append(1e3 * (when - chunks[index]))
            times.same_pass.append(1e3 * (when - chunks[index + 1]))
    times.between += (1e3 * (later - at) for at, later in itertools.pairwise(chunks))


def _row(batch: int, times: Times) -> dict[str, Any]:
    if not times.wait:
        raise Refused("was streamed without features")
    return {
        "batch": batch,
        "tokens": len(times.wait),
        "itl_ms": round(statistics.median(times.between), 3),
        "same_pass_ms": _spread(times.same_pass),
        "same_pass_late_ms": _spread([max(0.0, one) for one in times.same_pass]),
        "same_pass_early_share": _share(times.same_pass),
        "wait_ms": _spread(times.wait),
        "wait_late_ms": _spread([max(0.0, one) for one in times.wait]),
        "wait_early_share": _share(times.wait),
    }


def _spread(values: list[float]) -> dict[str, float]:
    from numpy import percentile

    found = {f"p{q}": round(float(percentile(values, q)), 3) for q in QUANTILES}
    return {"min": round(min(values), 3), **found, "max": round(max(values), 3)}


def _share(values: list[float]) -> float:
    return round(sum(one < 0 for one in values) / len(values), 4)


def table(report: Report) -> None:
    grid = Table(title="ms until a token's feature event has come: p50 / p90 / p99")
    for heading in (
        "batch",
        "after the chunk of the same forward pass",
        "of them earlier than it",
        "after the token's own chunk",
        "between chunks (p50)",
        "tokens",
    ):
        grid.add_column(heading, justify="right")
    for row in report["rows"]:
        grid.add_row(
            str(row["batch"]),
            _shown(row["same_pass_late_ms"]),
            f"{row['same_pass_early_share']:.0%}",
            _shown(row["wait_late_ms"]),
            f"{row['itl_ms']:.1f}",
            str(row["tokens"]),
        )
    console.print(grid)
    console.print(
        "A token's features come from the forward pass that reads it, one step after its chunk; the"
        " chunk of the next token leaves that pass too. Events that came earlier count as 0."
    )


def _shown(spread: dict[str, float]) -> str:
    return " / ".join(f"{spread[f'p{q}']:.1f}" for q in QUANTILES)


def draw(report: Report, axes: Any) -> None:
    """Quantiles by batch size."""
    rows = report["rows"]
    batches = [row["batch"] for row in rows]
    for name, style in (("same_pass_ms", "-"), ("wait_ms", ":")):
        for q in QUANTILES:
            values = [row[name][f"p{q}"] for row in rows]
            label = f"{'same pass' if name == 'same_pass_ms' else 'own chunk'}, p{q}"
            axes.plot(batches, values, style, marker="o", label=label)
    axes.set(xlabel="concurrent chats", ylabel="ms from chunk to feature event", xscale="log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.legend()
