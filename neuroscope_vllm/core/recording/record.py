"""What is recorded of one choice of a request."""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from neuroscope_vllm.core.config import Redact
from neuroscope_vllm.core.events import encoder
from neuroscope_vllm.core.wire import Site

TOKENS = ("prompt", "token")
"""Names of the events that are `TokenEvent`s."""
PLACEHOLDER = "▮ "
"""What stands for the text of a token that was left out; the space lets lines break."""
NO_ID = -1
"""Its id."""
_CHOICE = re.compile(r"^\d+_")
_ANSWER_PREFIX = re.compile(r"^(chatcmpl-|cmpl-|resp_|generate-tokens-|generative-scoring-)")


def aliases(request_id: str, internal_id: str) -> list[str]:
    """Every id a reader may know a choice by: vLLM answers `chatcmpl-<X-Request-Id>`, and under
    n > 1 runs choices of their own, `<i>_<id of them all>`."""
    of_all = _CHOICE.sub("", internal_id)
    answered = _ANSWER_PREFIX.sub("", request_id, count=1)
    return list(dict.fromkeys([request_id, answered, internal_id, of_all]))


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What the server that told a trace said of itself.

    Attributes:
        model: As served.
        model_source: Its folder, or its repository on the hub with @revision, where known.
        sites: What was observed, by layer.
        special_token_ids: Tokens that are no text but marks.
        redact: What was left out.
    """

    model: str
    model_source: str | None = None
    sites: list[Site] = []
    special_token_ids: list[int] = []
    redact: Redact = "none"


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Which choice, and how much of it.

    Attributes:
        epoch: Of the side process that told it, as in the ids of its events.
        created: When the request began, unix seconds.
        events_total: Events that there were, those included that the hub had given up already.
        events: The last so many of them, which are recorded.
        started, ended: When the first and the last of these were told, unix seconds; None where
            nobody noted it.
        secret: Digest of its stream secret; None: it has none, or nobody noted that.
    """

    request_id: str
    internal_id: str
    choice: int
    epoch: str
    created: float
    events_total: int
    events: int
    started: float | None = None
    ended: float | None = None
    secret: bytes | None = None

    @property
    def began(self) -> float:
        return self.created if self.started is None else self.started


class RecordedEvent(msgspec.Struct, gc=False):
    """An event as its readers got it.

    Attributes:
        name: As in `events.EVENTS`.
        layer: The layer it tells of, if one.
        epoch, seq: Its id, `<epoch>-<seq>`.
        time: When it was told, unix seconds to the microsecond; None where nobody noted it.
        json: One of the structs of `events`.
    """

    name: str
    layer: int | None
    epoch: str
    seq: int
    time: float | None
    json: bytes

    @property
    def id(self) -> bytes:
        return f"{self.epoch}-{self.seq}".encode()

    @property
    def named(self) -> bytes:
        """JSON with name and id inside, as in a trace and on NDJSON."""
        return _NAMED % (self.name.encode(), self.id, self.json[1:])


class RecordedTrace(NamedTuple):
    """A choice that ended, and what was kept of it."""

    head: Head
    events: list[RecordedEvent]

    @property
    def json(self) -> bytes:
        """As it stands in `choices` of GET /v1/requests/{id}."""
        head = self.head
        summary = {
            "request_id": head.request_id,
            "internal_id": head.internal_id,
            "choice": head.choice,
            "created": head.created,
            "finished": True,
            "events_total": head.events_total,
            "events_kept": head.events,
        }
        told = b",".join([event.named for event in self.events])
        return b'%b,"events":[%b]}' % (encoder.encode(summary)[:-1], told)


class _Told(msgspec.Struct):
    """What stands beside the struct in an event of GET /v1/requests/{id}."""

    event: str
    id: str
    layer: int | None = None


class _Answered(msgspec.Struct):
    request_id: str
    internal_id: str
    choice: int
    created: float
    finished: bool
    events_total: int
    events: list[msgspec.Raw]


class _Answer(msgspec.Struct):
    choices: list[_Answered]


_NAMED = b'{"event":"%b","id":"%b",%b'


def of_answer(answer: bytes) -> list[tuple[RecordedTrace, bool]]:
    """The choices of what GET /v1/requests/{id} answered, and whether each is finished; without
    times. Raises msgspec.MsgspecError or ValueError on anything else."""
    return [
        (_of_choice(choice), choice.finished)
        for choice in msgspec.json.decode(answer, type=_Answer).choices
    ]


def _of_choice(choice: _Answered) -> RecordedTrace:
    events = [_of_named(bytes(raw)) for raw in choice.events]
    head = Head(
        request_id=choice.request_id,
        internal_id=choice.internal_id,
        choice=choice.choice,
        epoch=events[0].epoch if events else "",
        created=choice.created,
        events_total=choice.events_total,
        events=len(events),
    )
    return RecordedTrace(head, events)


def _of_named(json: bytes) -> RecordedEvent:
    told = msgspec.json.decode(json, type=_Told)
    epoch, _, seq = told.id.rpartition("-")
    event = RecordedEvent(told.event, told.layer, epoch, int(seq), None, b"{}")
    before = len(event.named) - 1
    event.json = b"{" + json[before:]
    if event.named != json:
        raise ValueError(f"event {told.id} is not in the form that neuroscope writes")
    return event
