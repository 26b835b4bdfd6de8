"""What a client asks for, in the fields of vLLM's OpenAI server. Torch-free."""

from __future__ import annotations

import json
import logging
import math
from typing import Any, Literal, TypeVar

import msgspec

logger = logging.getLogger(__name__)

REFUSED = {
    "best_of": "ask for n answers instead",
    "echo": "the prompt is the client's own",
    "suffix": "put the whole text in the prompt",
    "tools": "describe them in a message",
    "functions": "describe them in a message",
    "structured_outputs": "ask for the form in a message",
    "guided_json": "ask for the form in a message",
    "guided_regex": "ask for the form in a message",
    "guided_choice": "ask for the form in a message",
    "guided_grammar": "ask for the form in a message",
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use logit_bias",
    "use_beam_search": "leave it out",
    "prompt_embeds": "send text or token ids",
    "chat_template": "the model's own is used",
    "documents": "put them in a message",
    "mm_processor_kwargs": "only text is read",
}
"""Fields that change the answer, which this backend can not do; and what to do instead."""
MOST_LOGPROBS = 20
MOST_CHOICES = 128
MOST_DIGITS = 18
"""Of a token id. Python does not even read a number of some thousand."""


class Refused(Exception):
    """An answer that is no 200, as vLLM words and types it."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        # What a client sent, and is repeated here, may hold half a character.
        self.message = message.encode(errors="replace").decode()
        self.param = param and param.encode(errors="replace").decode()
        self.status = status


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str = "text"


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of chats and completions alike; None where the model's own default holds."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    request_id: str | None = None
    response_format: ResponseFormat | None = None
    vllm_xargs: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def truncated(self, prompt: list[int], longest: int) -> list[int]:
        """Its last tokens, if they are what is asked for; -1: as many as fit."""
        kept = self.truncate_prompt_tokens
        if kept is None:
            return prompt
        return prompt[max(len(prompt) - (longest - 1 if kept == -1 else kept), 0) :]

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatAsk(Ask, frozen=True, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tool_choice: Literal["none", "auto"] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def wanted_logprobs(self) -> int | None:
        """How many beside the token's own, if any."""
        return self.top_logprobs if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionAsk(Ask, frozen=True, kw_only=True):
    prompt: str | list[Any]
    max_tokens: int | None = 16
    logprobs: int | None = None
    add_special_tokens: bool = True

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each a text or token ids."""
        given = self.prompt
        if isinstance(given, str) or (given and all(type(one) is int for one in given)):
            return [given]
        if not given or not all(_is_prompt(one) for one in given):
            raise Refused("prompt is no text, token ids, or a list of either.", "prompt")
        return given


A = TypeVar("A", ChatAsk, CompletionAsk)


def read(body: Any, kind: type[A]) -> A:
    """Raises Refused: A field is wrong, or asks for what this backend can not do."""
    if not isinstance(body, dict):
        raise Refused("the body is no JSON object.")
    for name, value in body.items():
        if name == "vllm_xargs":  # Whoever reads them says it better.
            continue
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            said = f"{name} holds half a surrogate pair, which is no character."
            raise Refused(said, name) from None
        except RecursionError:
            raise Refused(f"{name} is nested too deeply.", name) from None
    for name, instead in REFUSED.items():
        if body.get(name):
            raise Refused(f"{name} is not served by the transformers backend; {instead}.", name)
    # A completion's max_tokens is 16, and null for all there is room for.
    given = {name: v for name, v in body.items() if v is not None or name == "max_tokens"}
    if unknown := given.keys() - {field.name for field in msgspec.structs.fields(kind)}:
        logger.warning("neuroscope: fields ignored in a request: %s", ", ".join(sorted(unknown)))
    try:
        ask = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        said = str(error)
        field = said.partition("`$.")[2].rstrip("`") or None
        raise Refused(f"{said}.", field) from None
    _check(ask)
    return ask


def _check(ask: ChatAsk | CompletionAsk) -> None:
    """Raises Refused. The bounds are vLLM's."""
    _within("n", ask.n, 1, MOST_CHOICES)
    _within("seed", ask.seed, -(1 << 63), (1 << 63) - 1)
    _within("max_tokens", ask.limit, 1)
    _within("min_tokens", ask.min_tokens, 0)
    _within("temperature", ask.temperature, 0)
    _within("top_p", ask.top_p, 0, 1)
    _within("min_p", ask.min_p, 0, 1)
    _within("presence_penalty", ask.presence_penalty, -2, 2)
    _within("frequency_penalty", ask.frequency_penalty, -2, 2)
    _within("repetition_penalty", ask.repetition_penalty, 0)
    logprobs = "top_logprobs" if isinstance(ask, ChatAsk) else "logprobs"
    _within(logprobs, ask.wanted_logprobs, 0, MOST_LOGPROBS)
    _within("prompt_logprobs", ask.prompt_logprobs, 0, MOST_LOGPROBS)
    _within("truncate_prompt_tokens", ask.truncate_prompt_tokens, -1)
    if ask.top_p == 0 or ask.repetition_penalty == 0:
        raise Refused("top_p and repetition_penalty must lie above 0.")
    if ask.top_k is not None and ask.top_k < -1:
        raise Refused("top_k must be -1 or 0 (all), or at least 1.", "top_k")
    if ask.limit is not None and ask.min_tokens > ask.limit:
        raise Refused(f"min_tokens is {ask.min_tokens}, above max_tokens.", "min_tokens")
    if "" in ask.stops:
        raise Refused("stop holds an empty text.", "stop")
    if ask.n > 1 and ask.temperature == 0:
        raise Refused("n must be 1 with temperature 0: all answers would be the same.", "n")
    if ask.response_format is not None and ask.response_format.type != "text":
        raise Refused(
            f"response_format {ask.response_format.type} is not served by the transformers"
            " backend; ask for the form in a message.",
            "response_format",
        )
    for name, bias in (ask.logit_bias or {}).items():
        if not name.isdecimal() or len(name) > MOST_DIGITS:
            raise Refused(f"logit_bias names {name[:40]!r}, which is no token id.", "logit_bias")
        _within("logit_bias", bias, -100, 100)
    if ask.stream_options is not None and not ask.stream:
        raise Refused("stream_options can only be given with stream.", "stream_options")
    if isinstance(ask, ChatAsk) and ask.chat_template_kwargs.get("chat_template"):
        said = f"chat_template is not taken from requests; {REFUSED['chat_template']}."
        raise Refused(said, "chat_template_kwargs")
    if isinstance(ask, ChatAsk) and ask.top_logprobs and not ask.logprobs:
        raise Refused("top_logprobs can only be given with logprobs.", "top_logprobs")
    if ask.stream and ask.prompt_logprobs is not None:
        raise Refused("prompt_logprobs can not be streamed.", "prompt_logprobs")


def _within(name: str, value: float | None, least: float, most: float | None = None) -> None:
    if value is not None and not (least <= value < math.inf and (most is None or value <= most)):
        end = "" if most is None else f" and at most {most}"
        raise Refused(f"{name} is {value}; it must be at least {least}{end}.", name)


def _is_prompt(one: Any) -> bool:
    return isinstance(one, str) or (
        isinstance(one, list) and bool(one) and all(type(token) is int for token in one)
    )
