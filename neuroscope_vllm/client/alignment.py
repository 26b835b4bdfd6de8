"""Which tokens a chunk of an answer is made of.

vLLM streams text, and the hub tells tokens whose texts, joined, are that text. With stop strings
both hold text back, by characters the one and by tokens the other, so counting would not do: a
token belongs to the chunk that completes its text.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

from neuroscope_vllm.core.errors import ServerError
from neuroscope_vllm.core.events import DoneEvent, RequestEvent, TokenEvent

CLOCK_S = 1.0
"""vLLM tells an answer's begin in whole seconds, and notes the request's at another moment."""
REMEMBERED = 2048
"""Requests that were answered."""


class Answered:
    """Engine's ids of the requests whose answers were told."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, internal_id: str) -> bool:
        return internal_id in self._names

    def is_new(self, tokens: list[TokenEvent]) -> bool:
        """Whether they are of no answer that was told; from now on they are."""
        names = {token.internal_id for token in tokens if token.internal_id}
        new = not any(name in self for name in names)
        self.add(names)
        return new

    def add(self, internal_ids: Iterable[str]) -> None:
        self._names.update(dict.fromkeys(internal_ids))
        while len(self._names) > REMEMBERED:
            self._names.popitem(last=False)


class Own:
    """Which of the requests that bear an answer's id is its own, as a client may give many the
    same: it began no earlier than the answer, and was not answered before."""

    def __init__(self, answer: Any, answered: Answered) -> None:
        """`answer`: A chunk or a whole one of openai's."""
        self._since = answer.created - CLOCK_S
        self._answered = answered
        self._others: set[str] = set()
        self._names: dict[int, str] = {}

    @property
    def names(self) -> list[str]:
        """Engine's ids of its choices, as far as they were heard of."""
        return list(self._names.values())

    def has(self, event: Any) -> bool:
        """Whether the event is of it.

        Raises ServerError: It may be of it or of another one.
        """
        name = getattr(event, "internal_id", None)
        if not name or name in self._others:
            return False
        earlier = isinstance(event, RequestEvent) and event.created < self._since
        if earlier or name in self._answered:
            self._others.add(name)
            return False
        if self._names.setdefault(event.choice, name) != name:
            raise ServerError(
                f"several requests have the id {event.request_id!r} at the same time, and which is"
                " its own is not known; give each an X-Request-Id of its own"
            )
        return True


class Alignment:
    """Puts the events of one request to the chunks of its answer; does no I/O."""

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}

    def hear(self, event: Any) -> None:
        """An event of the stream of the request."""
        match event:
            case RequestEvent():
                self._choice(event.choice).layers = max(len(event.layers), 1)
            case TokenEvent(phase=None):
                self._choice(event.choice).add(event)
            case DoneEvent():
                self._choice(event.choice).done = True
            case _:
                pass

    def said(self, chunk: Any) -> None:
        """A chunk of openai's, of a chat or of a completion."""
        for one in chunk.choices:
            choice = self._choice(one.index)
            text, parsed = _text(one)
            choice.text += text
            choice.astray |= parsed
            choice.ended |= one.finish_reason is not None

    def waits(self, chunk: Any) -> bool:
        """Whether tokens of the chunk, which was said, are still to come."""
        return any(self._choice(one.index).waits() for one in chunk.choices)

    def take(self, chunk: Any) -> list[TokenEvent]:
        """Its tokens, as far as they have come."""
        return [event for one in chunk.choices for event in self._choice(one.index).take()]

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice())


class _Choice:
    """
    Attributes:
        layers: How many events a token has.
        text: Said by chunks, and not yet taken.
        done, ended: No token, and no chunk with text, will come.
        astray: The chunks' text is not the tokens'.
    """

    def __init__(self) -> None:
        self.layers = 1
        self.text = ""
        self.done = self.ended = self.astray = False
        self._tokens: deque[list[TokenEvent]] = deque()

    def add(self, event: TokenEvent) -> None:
        if self._tokens and self._tokens[-1][0].token_index == event.token_index:
            self._tokens[-1].append(event)
        else:
            self._tokens.append([event])

    def waits(self) -> bool:
        if self.ended:
            return not self.done
        if self.astray or not self.text:
            return False
        rest = self.text
        for number, token in enumerate(self._tokens):
            if not self._whole(number):
                return True
            text = token[0].token
            if not rest.startswith(text):
                self.astray = not text.startswith(rest)
                return False  # it ends in a later chunk, or the two differ
            rest = rest[len(text) :]
            if not rest:
                return False
        return True

    def take(self) -> list[TokenEvent]:
        taken: list[TokenEvent] = []
        while self._tokens and self._whole(0) and self._due(self._tokens[0][0].token):
            taken += self._tokens.popleft()
        return taken

    def _due(self, text: str) -> bool:
        """Whether the chunk takes the next token, and its text off what was said."""
        if self.ended or self.astray:
            return True
        # A token without text is part of a character, and goes with the one that completes it.
        if not self.text or not self.text.startswith(text):
            return False
        self.text = self.text[len(text) :]
        return True

    def _whole(self, number: int) -> bool:
        """Whether all events of a token have come."""
        last = number == len(self._tokens) - 1
        return not last or self.done or len(self._tokens[number]) >= self.layers


def _text(choice: Any) -> tuple[str, bool]:
    """Of a chunk's choice; and whether a parser took something out of it."""
    delta = getattr(choice, "delta", None)
    if delta is None:
        return getattr(choice, "text", None) or "", False
    reasoning = getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None)
    return delta.content or "", bool(reasoning or delta.tool_calls)
