"""All that is known of one request, and a view of it that asks the network for nothing."""

from __future__ import annotations

import html
import tempfile
import webbrowser
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from neuroscope_vllm.client.following import Event
from neuroscope_vllm.core import events
from neuroscope_vllm.core.events import TokenEvent
from neuroscope_vllm.core.inspection.page import PageText, trace_page
from neuroscope_vllm.core.inspection.record import of_events

FRAME_HEIGHT = "32rem"
APART_S = 1.0
"""All choices of an answer begin within less."""


class TopFeature(msgspec.Struct, frozen=True, kw_only=True):
    """A feature and where it scored best.

    Attributes:
        activation, score: There.
        position: Where that is.
        token: The token there.
        tokens: On how many tokens it is among the reported features.
    """

    layer: int
    index: int
    label: str | None
    unreliable: bool
    dense: bool
    activation: float
    score: float
    choice: int
    position: int
    token: str
    tokens: int


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice as GET /v1/requests/{id} tells it; `events` as they came."""

    request_id: str
    internal_id: str
    choice: int
    created: float
    finished: bool
    events_total: int
    events_kept: int
    events: list[msgspec.Raw] = []


class _Named(msgspec.Struct):
    event: str
    id: str = ""


class _Kept(msgspec.Struct):
    choices: list[Choice]


class Trace:
    """The events of a request: all its choices, or one.

    A notebook shows it as coloured tokens; `show` does elsewhere. Where clients gave several
    requests one X-Request-Id, it is the newest of them; the engine's ids tell the others apart.

    Attributes:
        request_id: As vLLM answered it.
        choices: Their numbers, several under n > 1.
        finished: Whether no more will come.
        complete: Whether nothing was given up for want of memory (`memory_mb`).
        events: All, by choice.
        tokens: Prompt and answer, by choice, position and layer: an event per observed layer.
    """

    def __init__(self, told: Sequence[Choice], special_ids: Collection[int] = ()) -> None:
        """
        Args:
            told: At least one choice.
            special_ids: Tokens that are marks and no text.
        """
        self._told = told
        self._special = frozenset(special_ids)
        self.request_id = told[0].request_id
        self.choices = [one.choice for one in told]
        self.finished = all(one.finished for one in told)
        self.complete = all(one.events_kept == one.events_total for one in told)

    @classmethod
    def decode(
        cls, content: bytes, special_ids: Collection[int] = (), since: float = 0.0
    ) -> Trace | None:
        """Of an answer of GET /v1/requests/{id}; None: nothing in it began at `since` or later.

        Raises msgspec.MsgspecError.
        """
        told = msgspec.json.decode(content, type=_Kept).choices
        if not (told := sorted((one for one in told if one.created >= since), key=_began)):
            return None
        # What had ended when the newest began is another request, perhaps with more choices.
        own = [one for one in told if not _ended_before(one, told[-1])]
        newest = {one.choice: one for one in own}
        return cls([newest[number] for number in sorted(newest)], special_ids)

    @cached_property
    def events(self) -> list[Event]:
        return [event for one in self._told for event in _decoded(one)]

    @cached_property
    def tokens(self) -> list[TokenEvent]:
        return [event for event in self.events if isinstance(event, TokenEvent)]

    @property
    def prompt(self) -> list[TokenEvent]:
        """Tokens of the prompt, of each choice."""
        return [token for token in self.tokens if token.phase == "prompt"]

    @property
    def answer(self) -> list[TokenEvent]:
        """Generated tokens."""
        return [token for token in self.tokens if token.phase is None]

    @property
    def text(self) -> str:
        """What was generated, as vLLM answered it; of several choices one after another."""
        layers: dict[tuple[int, int], str] = {}
        for token in self.answer:
            layers.setdefault((token.choice, token.position), token.token)
        return "".join(layers.values())

    def choice(self, number: int) -> Trace:
        """One choice alone. Raises KeyError: there is no such choice."""
        found = [one for one in self._told if one.choice == number]
        if not found:
            raise KeyError(f"request {self.request_id} has no choice {number}")
        return Trace(found, self._special)

    def prompts_only(self) -> Trace:
        """Without what was generated."""
        trace = Trace(self._told, self._special)
        trace.events = [e for e in self.events if isinstance(e, TokenEvent) and e.phase]
        return trace

    def top(self, k: int = 10, layer: int | None = None) -> list[TopFeature]:
        """The k features that score best on some token, best first.

        Dense features, special tokens and attention sinks, which say little of a text, are left
        out. Features that are not among the reported ones of any token are not known here.
        """
        best: dict[tuple[int, int], tuple[events.Feature, TokenEvent]] = {}
        counts: dict[tuple[int, int], int] = {}
        for token in self.tokens:
            if token.layer is None or layer not in (None, token.layer) or token.sink:
                continue
            if token.token_id in self._special:
                continue
            for feature in token.top_features:
                key = token.layer, feature.index
                counts[key] = counts.get(key, 0) + 1
                if not feature.dense and (key not in best or feature.score > best[key][0].score):
                    best[key] = feature, token
        ranked = sorted(best.items(), key=lambda item: -item[1][0].score)[:k]
        return [
            TopFeature(
                layer=key[0],
                index=feature.index,
                label=feature.label,
                unreliable=feature.unreliable,
                dense=feature.dense,
                activation=feature.activation,
                score=feature.score,
                choice=token.choice,
                position=token.position,
                token=token.token,
                tokens=counts[key],
            )
            for key, (feature, token) in ranked
        ]

    def html(self) -> str:
        """A page of its own: tokens coloured by their features. It holds no address but its own
        script and style, and its policy allows no other."""
        texts = [
            PageText(heading=heading, tokens=of_events(tokens, self._special))
            for heading, tokens in self._parts()
        ]
        model = next((e.model for e in self.events if isinstance(e, events.RequestEvent)), None)
        about = [f"request {self.request_id}" + (f", {model}" if model else "")]
        most = max((len(token.top_features) for token in self.tokens), default=0)
        about.append(f"a feature is known only where it is among the {most} best")
        return trace_page(f"{self.request_id}: features", about, texts)

    def save(self, path: str | Path) -> Path:
        """Write the page. Raises OSError."""
        path = Path(path)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def show(self) -> None:
        """In a notebook below the cell, else in the browser, as a file that stays until the
        system clears its folder for temporary ones."""
        if (display := _notebook()) is not None:
            display(self)
            return
        with tempfile.NamedTemporaryFile(
            prefix="neuroscope-", suffix=".html", delete=False
        ) as file:
            file.write(self.html().encode())
        webbrowser.open(Path(file.name).as_uri())

    def _repr_html_(self) -> str:
        # A frame of its own keeps the page's style and script from the notebook's.
        page = html.escape(self.html(), quote=True)
        return (
            f'<iframe sandbox="allow-scripts" style="width:100%;height:{FRAME_HEIGHT};border:0"'
            f' title="features of request {html.escape(self.request_id)}" srcdoc="{page}"></iframe>'
        )

    def __repr__(self) -> str:
        state = "finished" if self.finished else "running"
        return f"<Trace of {self.request_id}, {state}, {len(self.tokens)} tokens>"

    def _parts(self) -> Iterator[tuple[str, list[TokenEvent]]]:
        for number in self.choices:
            of = f" of choice {number}" if len(self.choices) > 1 else ""
            for heading, tokens in (("prompt", self.prompt), ("answer", self.answer)):
                if mine := [token for token in tokens if token.choice == number]:
                    yield heading + of, mine


def _began(choice: Choice) -> float:
    return choice.created


def _ended_before(one: Choice, other: Choice) -> bool:
    """Whether one's last event was told before the other's first, and not as choices of an answer
    may be."""
    near = other.created - one.created < APART_S
    if near or not (one.finished and one.events and other.events):
        return False
    ids = (msgspec.json.decode(raw, type=_Named).id for raw in (one.events[-1], other.events[0]))
    (epoch, _, last), (same, _, first) = (id_.rpartition("-") for id_ in ids)
    return epoch == same and int(last) < int(first)


def _decoded(choice: Choice) -> Iterator[Event]:
    for raw in choice.events:
        kind = events.EVENTS.get(msgspec.json.decode(raw, type=_Named).event)
        if kind is not None:  # else of a newer server
            yield msgspec.json.decode(raw, type=kind)  # pyright: ignore[reportReturnType]


def _notebook() -> Any:
    """IPython's `display` in a kernel that shows HTML; None elsewhere."""
    try:
        from IPython.core.getipython import get_ipython  # pyright: ignore
        from IPython.display import display  # pyright: ignore
    except ImportError:
        return None
    shell: Any = get_ipython()  # pyright: ignore
    return display if shell is not None and hasattr(shell, "kernel") else None  # pyright: ignore
