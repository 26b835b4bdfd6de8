"""What servers send, read with care: it may be anything, whatever its status. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Dollars = Annotated[float, msgspec.Meta(ge=0)]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What a server sent.

    Attributes:
        text: The answer, as it stands.
        problem: Why it is no whole answer, if the server says so.
        prompt_tokens, completion_tokens: As the server counted them.
        cost: In US dollars, where the server says it.
        model: What answered.
    """

    text: str
    problem: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    model: str | None = None


class ChatMessage(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class Choice(msgspec.Struct):
    message: ChatMessage | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    cost: _Dollars | None = None


class Completion(msgspec.Struct):
    """A chat completion of OpenAI's API; `error` is a router's, about what is behind it."""

    choices: list[Choice] | None = None
    model: str | None = None
    usage: Usage | None = None
    error: Any = None

    def reply(self) -> Reply:
        choice = self.choices[0] if self.choices else Choice()
        message, usage = choice.message, self.usage or Usage()
        problem = None
        if message is None:
            problem = "the answer is empty"
        elif choice.finish_reason == "length":
            problem = "the answer is cut off"
        elif message.refusal or choice.finish_reason == "content_filter":
            problem = "the model refused"
        return Reply(
            text=(message.content if message else None) or "",
            problem=problem,
            prompt_tokens=usage.prompt_tokens or 0,
            completion_tokens=usage.completion_tokens or 0,
            cost=usage.cost,
            model=self.model or None,
        )


class Block(msgspec.Struct):
    type: str
    text: str = ""


class MessageUsage(msgspec.Struct):
    input_tokens: _Count
    output_tokens: _Count
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None


class Message(msgspec.Struct):
    """A message of Anthropic's API."""

    content: list[Block]
    usage: MessageUsage
    stop_reason: str | None = None
    model: str | None = None

    def reply(self) -> Reply:
        problems = {"max_tokens": "the answer is cut off", "refusal": "the model refused"}
        usage = self.usage
        return Reply(
            text="".join(block.text for block in self.content if block.type == "text"),
            problem=problems.get(self.stop_reason or ""),
            prompt_tokens=usage.input_tokens
            + (usage.cache_read_input_tokens or 0)
            + (usage.cache_creation_input_tokens or 0),
            completion_tokens=usage.output_tokens,
            model=self.model or None,
        )


class Models(msgspec.Struct):
    """The list of models of either API."""

    data: list[dict[str, Any]] = []


def unreadable(error: Exception) -> Reply:
    """For what is none of these; its tokens are not counted, so it may have been billed."""
    return Reply(text="", problem=f"what came is no answer of such a server ({error})")
