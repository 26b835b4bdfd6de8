"""Whether what was published about a request is what vLLM answered: no position less, none twice,
none of another request. Torch-free; whether the features are right is `core.fit`'s question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

TOKEN_EVENTS = ("prompt", "token")
FAULTS = ("missing", "duplicated", "misattributed", "wrong_features")


class Verdict(msgspec.Struct):
    """The outcome of an audit. All four counts of faults are zero if the server told the truth.

    A fault is a position of a choice at one layer, and is counted once.
    """

    requests: int = 0
    tokens: int = 0
    """Positions of all choices, prompts included."""
    missing: int = 0
    duplicated: int = 0
    misattributed: int = 0
    wrong_features: int = 0
    worst_relative_error: float = 0.0

    @property
    def clean(self) -> bool:
        return not any(getattr(self, name) for name in FAULTS)


@dataclass(frozen=True, slots=True)
class Answer:
    """What vLLM itself answered to one request."""

    ids: frozenset[str]
    """The ids that its events may carry."""
    prompt: Sequence[int]
    choices: Mapping[int, Sequence[int]]
    """Generated token ids by choice, as far as the client read them."""
    complete: bool = True
    """False: the client left, and vLLM may have generated more."""
    may_cache: bool = True
    """Whether its prompt may have been served from the prefix cache."""
    texts: Mapping[int, str] = field(default_factory=dict)
    """Text of the choices whose answer has it as it was generated, as far as the client read it."""


class Row(NamedTuple):
    """An event with features to be checked: of which choice, at which position and layer."""

    choice: int
    position: int
    layer: int
    event: Mapping[str, Any]


@dataclass(slots=True)
class Audit:
    """The audit of one request's events.

    Attributes:
        contexts: Token ids from position 0 by choice. Of an abandoned request, what was published
            beyond what its client read.
        rows: The events whose features remain to be checked.
        cached: Prompt positions that were rightly published without features: the prefix cache
            made their forward pass needless.
    """

    contexts: dict[int, list[int]]
    rows: list[Row] = field(default_factory=list)
    missing: int = 0
    duplicated: int = 0
    misattributed: int = 0
    cached: int = 0


def audit(answer: Answer, events: Iterable[Mapping[str, Any]], layers: Sequence[int]) -> Audit:
    """Compare the events of a request's stream, each with its name as `event`, with the answer.

    missing: no event, or one without features that had no reason to lack them. The last token of
        a choice has one, and so has a `cached` prompt token. A reported gap is none: the features
        were promised.
    duplicated: every event beyond the first of a position.
    misattributed: another request's id, a choice or position that vLLM never answered, another
        token than vLLM's, a position after a later one; else, once a choice, another text.
    """
    told = [event for event in events if event["event"] in TOKEN_EVENTS]
    prompt = list(answer.prompt)
    contexts = {choice: prompt + list(ids) for choice, ids in answer.choices.items()}
    if not answer.complete:
        _extend(contexts, answer, told)
    result = Audit(contexts)
    seen: set[tuple[int, int, int]] = set()
    furthest: dict[tuple[int, int], int] = {}
    texts = dict.fromkeys(contexts, "")
    for event in told:
        choice, position, layer = event["choice"], event["position"], event["layer"]
        context = contexts.get(choice)
        if context is None or not 0 <= position < len(context):
            result.misattributed += 1
        elif layer not in layers:
            continue  # a null layer: the server had not heard yet which layers it observes
        elif (slot := (choice, position, layer)) in seen:
            result.duplicated += 1
        else:
            seen.add(slot)
            in_order = position > furthest.get((choice, layer), -1)
            furthest[choice, layer] = max(position, furthest.get((choice, layer), -1))
            ours = event["request_id"] in answer.ids and in_order
            if event["event"] == "token" and layer == layers[0]:
                texts[choice] += event["token"]
            if ours and _is_token(event, context, len(prompt)):
                _take(result, event, Row(*slot, event), answer)
            else:
                result.misattributed += 1
    positions = sum(len(context) for context in contexts.values())
    result.missing += positions * len(layers) - len(seen)
    if result.missing or result.duplicated or result.misattributed:
        return result  # which a text would only show once more
    for choice, text in answer.texts.items():
        whole = texts[choice] if answer.complete else texts[choice][: len(text)]
        result.misattributed += whole != text
    return result


def _extend(
    contexts: dict[int, list[int]], answer: Answer, told: Iterable[Mapping[str, Any]]
) -> None:
    """What vLLM generated after its client had left, which only the events know."""
    beyond = {
        (event["choice"], event["position"]): event["token_id"]
        for event in told
        if event["request_id"] in answer.ids
    }
    for choice, context in contexts.items():
        while (token_id := beyond.get((choice, len(context)))) is not None:
            context.append(token_id)


def _is_token(event: Mapping[str, Any], context: Sequence[int], prompt_tokens: int) -> bool:
    """Whether the event tells the token that stands at its position, as what it is."""
    generated = event["position"] - prompt_tokens
    kind = ("token", generated) if generated >= 0 else ("prompt", None)
    said = (event["event"], event["token_index"])
    return said == kind and event["token_id"] == context[event["position"]]


def _take(result: Audit, event: Mapping[str, Any], row: Row, answer: Answer) -> None:
    prompt_tokens = len(answer.prompt)
    if event.get("cached") and not answer.may_cache:
        result.missing += 1
    elif event["features_at"] == "self":
        result.rows.append(row)
    elif event.get("cached") and row.position < prompt_tokens - 1:
        result.cached += 1
    elif row.position < prompt_tokens or row.position < len(result.contexts[row.choice]) - 1:
        result.missing += 1
