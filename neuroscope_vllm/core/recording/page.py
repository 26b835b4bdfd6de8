"""A recorded request as one HTML file, which asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from neuroscope_vllm.core.events import TokenEvent
from neuroscope_vllm.core.inspection.page import PageText, trace_page
from neuroscope_vllm.core.inspection.record import of_events
from neuroscope_vllm.core.recording.record import TOKENS, About, RecordedTrace

_decoder = msgspec.json.Decoder(TokenEvent)


def html_page(about: About, traces: Sequence[RecordedTrace], source: str) -> str:
    """The choices of a request, prompt and answer, token by token.

    Args:
        source: Where they are from, for people.
    """
    head = traces[0].head
    when = datetime.fromtimestamp(head.created, UTC)
    lines = [f"{head.request_id}, {when:%Y-%m-%d %H:%M:%S} UTC, from {source}"]
    lines += [f"layer {s.layer}: {s.sae.source}, ranked by {s.ranking}" for s in about.sites]
    if about.sites:
        best = max(site.top_k for site in about.sites)
        lines.append(f"a feature is known only where it is among the {best} best")
    if about.redact == "text":
        lines.append("recorded without text: each token is shown by a placeholder")
    texts = [_text(trace, about, of=len(traces)) for trace in traces]
    return trace_page(f"{about.model}: features", lines, texts)


def _text(trace: RecordedTrace, about: About, of: int) -> PageText:
    tokens = [_decoder.decode(event.json) for event in trace.events if event.name in TOKENS]
    head = trace.head
    heading = f"choice {head.choice}" if of > 1 else head.request_id
    if head.events < head.events_total:
        heading += f" (the last {head.events} of {head.events_total} events)"
    return PageText(heading=heading, tokens=of_events(tokens, set(about.special_token_ids)))
