"""Turns placed rows of one choice into events: text, labels, layers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
from tokenizers import Tokenizer

from neuroscope_vllm.core import events, wire
from neuroscope_vllm.core.detokenize import OutputText, Released, TextStream
from neuroscope_vllm.server.join import Choice, Done, Gap, Item, Placed
from neuroscope_vllm.server.rows import Row
from neuroscope_vllm.server.shown import Shown

logger = logging.getLogger(__name__)

Named = tuple[str, int | None, msgspec.Struct]
"""Event name, layer, event."""


@dataclass(slots=True)
class Narrator:
    """The story of one choice; owns its text and its numbers."""

    started: wire.RequestStarted
    model: str
    shown: Shown
    dense_of: Callable[[int], frozenset[int]]
    """Dense features of a layer."""
    tokenizer: Tokenizer | None
    prompt_tokens: int = field(init=False)
    completion_tokens: int = field(init=False, default=0)
    sampled_tokens: int = field(init=False, default=0)
    """Tokens heard of, those whose text is still held back included."""
    _prompt_text: TextStream = field(init=False)
    _prompt_broke: bool = field(init=False, default=False)
    _output: OutputText = field(init=False)
    _texts: deque[str] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        prompt_ids = self.prompt_ids
        self.prompt_tokens = len(prompt_ids)
        self._prompt_text = TextStream(self.tokenizer, [], skip_special_tokens=False, bounded=True)
        self._output = OutputText(
            TextStream(
                self.tokenizer,
                prompt_ids,
                self.started.skip_special_tokens,
                self.started.spaces_between_special_tokens,
            ),
            stop=self.started.stop if self.tokenizer is not None else [],
            include_stop_str_in_output=self.started.include_stop_str_in_output,
            min_tokens=self.started.min_tokens,
        )

    @property
    def prompt_ids(self) -> list[int]:
        return wire.int32(self.started.prompt_token_ids).tolist()

    def hear(self, sampled: wire.Sampled) -> Released:
        """The tokens of a step whose text is final."""
        self.sampled_tokens += len(sampled.token_ids)
        released = self._output.push(sampled.token_ids, sampled.finish_reason, sampled.stop_reason)
        self._texts.extend(released.texts)
        self.completion_tokens += len(released.token_ids)
        return released

    def request(self, retold: bool = False) -> Named:
        started = self.started
        event = events.RequestEvent(
            request_id=started.request_id,
            internal_id=started.internal_id,
            choice=started.choice,
            model=self.model,
            prompt_tokens=self.prompt_tokens,
            created=started.created,
            layers=self.started.layers,
            dp_rank=started.dp_rank,
            lora=started.lora,
            retold=retold,
            steering=started.steering,
            beam=started.beam,
            traceparent=started.traceparent,
        )
        return "request", None, event

    def error(self, message: str) -> Named:
        started = self.started
        error = events.ErrorBody(message, "server_error")
        event = events.ErrorEvent(started.request_id, started.choice, error, started.internal_id)
        return "error", None, event

    def never_followed(self) -> Named:
        """The end of a choice of which only its begin was told."""
        started = self.started
        event = events.DoneEvent(
            started.request_id,
            started.choice,
            "error",
            prompt_tokens=self.prompt_tokens,
            completion_tokens=0,
            cached_tokens=0,
            dropped=self.prompt_tokens,
            internal_id=started.internal_id,
        )
        return "done", None, event

    def steering(self, changed: wire.SteeringChanged) -> Named:
        event = events.SteeringEvent(
            request_id=self.started.request_id,
            choice=self.started.choice,
            position=changed.position or 0,
            steering=changed.steering,
            internal_id=self.started.internal_id,
        )
        return "steering", None, event

    def tell(self, items: list[Item], choice: Choice) -> Iterator[Named]:
        """Events of what the join put out, in order."""
        for item in items:
            if isinstance(item, Placed):
                yield from self._token(item)
            elif isinstance(item, Gap):
                yield "gap", None, self._gap(item)
            else:
                yield "done", None, self._done(item, choice)

    def _token(self, placed: Placed) -> Iterator[Named]:
        position = placed.position
        prompt = position < self.prompt_tokens
        if prompt:
            name, phase, token_index = "prompt", "prompt", None
            text = self._prompt(placed.token_id)
        else:
            name, phase, token_index = "token", None, position - self.prompt_tokens
            text = self._texts.popleft()
        started = self.started
        make = events.TokenEvent
        at = placed.row
        known = [layer[at] for layer in placed.rows.layers] if placed.rows is not None else []
        steered = placed.rows.steered if placed.rows is not None else {}
        for row in known:
            yield name, row.layer, make(
                started.request_id, started.choice, token_index, position, text,
                placed.token_id, row.layer, self._features(row), row.l0, "self", phase,
                placed.cached, bool(row.sink), started.internal_id,
                steered.get((at, row.layer), []),
            )  # fmt: skip
        if placed.rows is not None:
            for hit in placed.rows.hits.get(at, ()):
                yield "rule", hit.layer, self._rule(position, hit)
        if known and len(known) >= len(self.started.layers):
            return
        missing = set(self.started.layers).difference(row.layer for row in known)
        for layer in sorted(missing) or (None,):
            yield name, layer, make(
                started.request_id, started.choice, token_index, position, text,
                placed.token_id, layer, [], None, None, phase, placed.cached, False,
                started.internal_id,
            )  # fmt: skip

    def _prompt(self, token_id: int) -> str:
        try:
            return self._prompt_text.step(token_id)
        except Exception:
            # tokenizers raises nothing narrower. vLLM never decodes a prompt, so here is where the
            # text of one may break first; the request's features are none the worse for it.
            if not self._prompt_broke:
                self._prompt_broke = True
                logger.exception(
                    "neuroscope: token %d in the prompt of %s has no text",
                    token_id,
                    self.started.internal_id,
                )
            return ""

    def _features(self, row: Row) -> list[events.Feature]:
        shown, layer = self.shown, row.layer
        label_of, doubted = shown.labels(layer).get, shown.unreliable(layer)
        dense = self.dense_of(layer)
        return [
            events.Feature(
                index, label_of(index), activation, score, index in dense, index in doubted
            )
            for index, activation, score in zip(row.index, row.activation, row.score, strict=True)
            if index >= 0
        ]

    def _rule(self, position: int, hit: wire.RuleHit) -> events.RuleEvent:
        return events.RuleEvent(
            request_id=self.started.request_id,
            choice=self.started.choice,
            position=position,
            rule=hit.rule,
            layer=hit.layer,
            feature=hit.feature,
            activation=hit.activation,
            label=self.shown.labels(hit.layer).get(hit.feature),
            tag=hit.tag,
            stop=hit.stop,
            internal_id=self.started.internal_id,
        )

    def _gap(self, gap: Gap) -> events.GapEvent:
        return events.GapEvent(
            reason="dropped",
            request_id=self.started.request_id,
            choice=self.started.choice,
            start=gap.start,
            stop=gap.stop,
            count=gap.stop - gap.start,
            internal_id=self.started.internal_id,
        )

    def _done(self, done: Done, choice: Choice) -> events.DoneEvent:
        return events.DoneEvent(
            request_id=self.started.request_id,
            choice=self.started.choice,
            finish_reason=done.finish_reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=choice.cached_tokens or 0,
            dropped=choice.dropped,
            internal_id=self.started.internal_id,
        )
