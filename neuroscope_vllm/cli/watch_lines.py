"""The lines of `neuroscope watch`: one a token, or one each time a feature fires."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from json import dumps as json_escape
from typing import Any

from rich.console import Console
from rich.text import Text

from neuroscope_vllm.cli.inspect_table import PART, STYLES, printable
from neuroscope_vllm.core import events
from neuroscope_vllm.core.events import Feature, TokenEvent
from neuroscope_vllm.core.labels import clean_label

SHOWN = 3
"""Features a token, where they fit."""
TOKEN_CELLS, FEATURE_CELLS = 16, 28
PROMPT_TOKENS = 150
"""The end of a prompt that is shown."""
BEFORE_CHARS = 200
BAR = 8


class _Open:
    """A choice that runs."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.named = False
        self.prompt: deque[tuple[str, float]] = deque(maxlen=PROMPT_TOKENS)
        self.prompt_tokens = 0
        self.reached = -1
        self.text = ""


class _Lines:
    """What both views show: where requests begin and end, and what went wrong."""

    def __init__(self, console: Console, numbered: bool) -> None:
        self.console = console
        self.numbered = numbered
        self.most: dict[int | None, float] = {}
        self._open: dict[str, _Open] = {}
        self._count = 0

    def choice(self, event: Any) -> _Open:
        name = event.internal_id or f"{event.request_id}/{event.choice}"
        if name not in self._open:
            self._count += 1
            self._open[name] = _Open(self._count)
        return self._open[name]

    def close(self, event: events.DoneEvent) -> None:
        self._open.pop(event.internal_id or f"{event.request_id}/{event.choice}", None)

    def name(self, opened: _Open, event: Any, more: str = "") -> None:
        """The line on which a choice gets its number."""
        opened.named = True
        number = f"#{opened.number} " if self.numbered else ""
        choice = f", choice {event.choice}" if event.choice else ""
        self.note(f"{number}{event.request_id}{choice}{more}", "bold")

    def note(self, text: str, style: str) -> None:
        self.console.print(Text(printable(text), style=style))

    def share(self, layer: int | None, value: float) -> float:
        """Of the largest of this layer so far."""
        most = self.most[layer] = max(self.most.get(layer, 0.0), value)
        return max(value, 0.0) / most if most else 0.0

    def show_other(self, event: Any) -> None:
        """Events that say that something is wrong, or changes."""
        match event:
            case events.GapEvent():
                self.note(_gap(event), "yellow")
            case events.ErrorEvent():
                self.note(f"{event.request_id}: {event.error.message}", "red")
            case events.GoodbyeEvent():
                self.note("the server stopped; waiting for it", "yellow")
            case _:
                pass


class TokenLines(_Lines):
    """A line a token and layer, after a paragraph with the prompt."""

    def __init__(self, console: Console, numbered: bool, top_k: int | None) -> None:
        super().__init__(console, numbered)
        self._top_k = top_k
        self._layers: set[int] = set()

    def show(self, event: Any) -> None:
        match event:
            case events.RequestEvent():
                self._layers.update(event.layers)
                steered = ", steered" if event.steering else ""
                more = f", {event.prompt_tokens} prompt tokens{steered}"
                self.name(self.choice(event), event, more)
            case TokenEvent(phase="prompt"):
                self._hear_prompt(self.choice(event), event)
            case TokenEvent():
                opened = self.choice(event)
                self._show_prompt(opened)
                self._show_token(opened, event)
            case events.RuleEvent():
                tag = f" [{event.tag}]" if event.tag else ""
                stop = ", stops" if event.stop else ""
                of = f"feature {event.feature} of layer {event.layer}, {event.activation:.3g}"
                self.note(f"{self._tag(event)}rule {event.rule}{tag}: {of}{stop}", "magenta")
            case events.SteeringEvent():
                how = "steered otherwise" if event.steering else "not steered"
                self.note(f"{self._tag(event)}{how} from {event.position} on", "magenta")
            case events.DoneEvent():
                self._show_prompt(self.choice(event))
                lost = f", features of {event.dropped} lost" if event.dropped else ""
                count = f"{event.completion_tokens} tokens"
                self.note(f"{self._tag(event)}done ({event.finish_reason}), {count}{lost}", "dim")
                self.close(event)
            case _:
                self.show_other(event)

    def _tag(self, event: Any) -> str:
        return f"#{self.choice(event).number} " if self.numbered else ""

    def _hear_prompt(self, opened: _Open, event: TokenEvent) -> None:
        score = event.top_features[0].score if event.top_features else 0.0
        if event.position > opened.reached:  # the first layer of a token speaks for it
            opened.reached = event.position
            opened.prompt_tokens += 1
            opened.prompt.append((event.token, score))

    def _show_prompt(self, opened: _Open) -> None:
        """Once, coloured by the scores of its own tokens."""
        if not opened.prompt:
            return
        most = max(score for _, score in opened.prompt)
        text = Text()
        text.append(f"#{opened.number} " if self.numbered else "", style="dim")
        text.append("… " if opened.prompt_tokens > len(opened.prompt) else "", style="dim")
        for token, score in opened.prompt:
            share = score / most if most > 0 else 0.0
            text.append(printable(token), style=_style(share) or "dim")
        opened.prompt.clear()
        self.console.print(text)

    def _show_token(self, opened: _Open, event: TokenEvent) -> None:
        head = Text()
        head.append(self._tag(event), style="dim")
        if len(self._layers) > 1:
            head.append(f"L{event.layer} " if event.layer is not None else "L? ", style="dim")
        top = event.top_features
        share = self.share(event.layer, top[0].score) if top else 0.0
        first = event.position > opened.reached
        opened.reached = max(opened.reached, event.position)
        word = (repr(event.token) if event.token else PART) if first else ""
        head.append_text(_fitted(Text(word, style=_style(share) if top else "dim"), TOKEN_CELLS))
        for line in self._feature_lines(head, event):
            self.console.print(line, no_wrap=True, overflow="ellipsis", crop=True)

    def _feature_lines(self, head: Text, event: TokenEvent) -> Iterator[Text]:
        """As many features as can be read beside the token; below it those that were asked for,
        and what steering did."""
        room = self.console.width - head.cell_len
        beside = max(room // (FEATURE_CELLS + 1), 1)
        shown = event.top_features[: self._top_k or min(SHOWN, beside)]
        cells = max(room // min(beside, max(len(shown), 1)) - 1, 1)
        line = head
        if not shown:
            line.append(f" {_why_none(event)}", style="dim")
        for number, feature in enumerate(shown):
            if number and number % beside == 0:
                yield line
                line = Text(" " * (self.console.width - room))
            share = self.share(event.layer, feature.score)
            line.append(" ").append_text(_fitted(_feature(feature, share), cells))
        yield line
        for one in event.steered:
            text = f"{one.index}: {one.before:.3g} → {one.after:.3g} by steering"
            yield Text(" " * (self.console.width - room + 1) + text, style="magenta")


class FeatureLines(_Lines):
    """A line for each token on which one feature is reported, with the text before it."""

    def __init__(self, console: Console, layer: int, index: int, label: str | None) -> None:
        super().__init__(console, numbered=True)
        self._index = index
        named = f": {clean_label(label)}" if label else ", unlabelled"
        self.note(f"feature {index} of layer {layer}{named}", "bold")

    def show(self, event: Any) -> None:
        match event:
            case TokenEvent():
                opened = self.choice(event)
                found = next((f for f in event.top_features if f.index == self._index), None)
                if found is not None:
                    if not opened.named:
                        self.name(opened, event)
                    self._show(opened, event, found)
                opened.text = (opened.text + event.token)[-BEFORE_CHARS:]
            case events.DoneEvent():
                self.close(event)
            case _:
                self.show_other(event)

    def _show(self, opened: _Open, event: TokenEvent, found: Feature) -> None:
        share = self.share(event.layer, found.activation)
        head = Text()
        head.append(f"#{opened.number:<3} ", style="dim").append(f"{found.activation:7.3g} ")
        head.append("█" * max(round(share * BAR), 1), style=_style(share))
        head.append(" " * (BAR + 1 - max(round(share * BAR), 1)))
        word = Text(printable(event.token) or PART, style=f"reverse {_style(share)}".strip())
        word.truncate(TOKEN_CELLS, overflow="ellipsis")
        before = Text(printable(opened.text), style="" if event.phase is None else "dim")
        while before.cell_len > max(self.console.width - head.cell_len - word.cell_len - 1, 0):
            before = before[1:]
        self.console.print(head + before + word, no_wrap=True, crop=True)


def for_terminal(json: bytes) -> str:
    """The same JSON without what a terminal would obey. JSON itself escapes only what is below a
    space, and not the control characters above ASCII or the marks that turn text round."""
    return "".join(
        char if char.isprintable() else json_escape(char)[1:-1] for char in json.decode()
    )


def _feature(feature: Feature, share: float) -> Text:
    text = Text(f"{feature.activation:.3g} ", style=_style(share))
    label = clean_label(feature.label) if feature.label else ""
    doubt = "?" if feature.unreliable else ""
    # The label is what may be cut, not the number.
    text.append(f"[{feature.index}]", style="dim")
    return text.append(f" {label}{doubt}") if label else text


def _fitted(text: Text, cells: int) -> Text:
    text.truncate(cells, overflow="ellipsis", pad=True)
    return text


def _style(share: float) -> str:
    return next((style for least, style in STYLES if share >= least), "")


def _why_none(event: TokenEvent) -> str:
    if event.sink:
        return "attention sink"
    if event.cached:
        return "cached, features not kept"
    return "no active feature" if event.features_at else "no features"


def _gap(gap: events.GapEvent) -> str:
    match gap.reason:
        case "dropped":
            return f"gap: features of positions {gap.start} to {gap.stop} of {gap.request_id} lost"
        case "slow_reader":
            return f"gap: {gap.count} events went by faster than they were read"
        case "evicted":
            return f"gap: {gap.count} events are no longer kept"
        case "restarted":
            return "gap: the side process was started again"
