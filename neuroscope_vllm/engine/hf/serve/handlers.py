"""What `transformers serve` does with chats and completions, as vLLM's server answers them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

from neuroscope_vllm.core.access import digest
from neuroscope_vllm.core.request import KEY, RequestOptions, request_options
from neuroscope_vllm.core.steering.catalogue import Catalogue
from neuroscope_vllm.core.steering.settle import SteeringRefused, settle
from neuroscope_vllm.core.steering.settled import Steering
from neuroscope_vllm.engine.hf.serve import logprobs
from neuroscope_vllm.engine.hf.serve.ask import Ask, ChatAsk, CompletionAsk, Refused, read
from neuroscope_vllm.engine.hf.serve.generation import Generation, Generator, Piece

QUEUE_INTERVAL_S = 1.0
"""How often who waits is told how many are before it."""
AHEAD_HEADER = "X-Queue-Ahead"


class Served:
    """What both kinds of requests are answered from."""

    def __init__(self, generator: Generator, catalogue: Catalogue, name: str) -> None:
        """`name`: the model's, as clients know it."""
        self.generator, self.catalogue, self.name = generator, catalogue, name
        # It loads nothing: there is one model, and it is loaded.
        self.manager = ModelManager(device="cpu", attn_implementation="eager")
        self.state = GenerationState()
        self.created = int(time.time())

    def options(self, ask: Ask) -> RequestOptions:
        """Raises Refused: It asks for what we do not know."""
        for name in ask.vllm_xargs or ():
            if name.startswith(f"{KEY}_"):  # as vLLM's engine notes things for itself
                raise Refused(f"vllm_xargs.{name} is reserved; leave it out.", "vllm_xargs")
        try:
            return request_options(ask.vllm_xargs)
        except ValueError as error:
            raise Refused(str(error), "vllm_xargs") from None

    def steering(self, options: RequestOptions) -> Steering | None:
        """Raises Refused: It asks for what can not be done."""
        try:
            return settle(options, self.catalogue)
        except SteeringRefused as refusal:
            raise Refused(f"vllm_xargs.{KEY}.{refusal}", "vllm_xargs") from None

    def check_model(self, ask: Ask) -> None:
        if ask.model not in (None, self.name):
            raise Refused(f"The model `{ask.model}` does not exist.", "model", 404)

    def room(self, ask: ChatAsk | CompletionAsk, prompt: list[int]) -> int:
        """How many tokens it may generate. Raises Refused: They do not fit."""
        longest, length = self.generator.max_model_len, len(prompt)
        if not prompt:
            raise Refused("the prompt is empty; give at least one token.", "prompt")
        wanted = ask.limit
        if length + (wanted or 1) > longest:
            raise Refused(
                f"This model's maximum context length is {longest} tokens. However, you requested"
                f" {wanted or 1} output tokens and your prompt contains {length} input tokens."
                " Please reduce the length of the input prompt or the number of requested output"
                " tokens.",
                "input_tokens",
            )
        return longest - length if wanted is None else wanted

    def check_ids(self, ask: Ask, prompt: list[int]) -> None:
        size = self.generator.vocabulary
        for name, ids in (("prompt", prompt), ("stop_token_ids", ask.stop_token_ids or []),
                          ("logit_bias", map(int, ask.logit_bias or ()))):  # fmt: skip
            for token_id in ids:
                if not 0 <= token_id < size:
                    raise Refused(
                        f"{name} holds token id {token_id}; this model's end at {size - 1}.", name
                    )

    def decode(self, token_id: int) -> str:
        return self.generator.tokenizer.decode([token_id])


class _Answering:
    """The choices of one request, from its prompts to their pieces."""

    def __init__(
        self, served: Served, ask: ChatAsk | CompletionAsk, answer_id: str, prompts: list[list[int]]
    ) -> None:
        """Raises Refused before anything runs. `prompts`: token ids."""
        self.served, self.ask, self.id = served, ask, answer_id
        self.created = int(time.time())
        longest = served.generator.max_model_len
        self.prompts = prompts = [ask.truncated(prompt, longest) for prompt in prompts]
        options = served.options(ask)
        steering = served.steering(options)
        secret = digest(options.stream_secret) if options.stream_secret is not None else None
        rooms = [served.room(ask, prompt) for prompt in prompts]
        for prompt in prompts:
            served.check_ids(ask, prompt)
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def tell(piece: Piece) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self.choices = [
            Generation(
                ask,
                request_id=answer_id,
                choice=number * ask.n + draw,
                draw=draw,
                name=answer_id if isinstance(ask, ChatAsk) else f"{answer_id}-{number}",
                prompt_ids=prompt,
                max_tokens=room,
                steering=steering,
                secret=secret,
                wanted_logprobs=ask.wanted_logprobs,
                tell=tell,
            )
            for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
            for draw in range(ask.n)
        ]
        self.ahead = len(served.generator.queue())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Whoever leaves it early takes its choices with them."""
        generator, submitted = self.served.generator, []
        try:
            for one in self.choices:
                generator.submit(one)
                submitted.append(one)
            yield
        finally:
            for one in submitted:
                if not one.over:
                    generator.cancel(one)

    async def pieces(self) -> AsyncIterator[Piece | int]:
        """Until all choices ended; an int says how many are still before the first.

        Raises Refused: A choice failed.
        """
        open_choices = {one.choice for one in self.choices}
        while open_choices:
            try:
                piece = await asyncio.wait_for(self._pieces.get(), QUEUE_INTERVAL_S)
            except TimeoutError:
                if ahead := self.served.generator.ahead(self.choices[0]):
                    yield ahead
                continue
            if piece.error is not None:
                status, message = piece.error
                raise Refused(message, None, status)
            yield piece
            if piece.finish_reason is not None:
                open_choices.discard(piece.choice)

    def usage(self, generated: int) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    def headers(self) -> dict[str, str]:
        return {AHEAD_HEADER: str(self.ahead)}


class _Choice:
    """What the pieces of one choice come to."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[logprobs.Ranked] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason


names_itself: ContextVar[bool] = ContextVar("names_itself", default=False)
"""Whether the request's client sent an X-Request-Id."""


def named(ask: Ask, request_id: str) -> str:
    """The header's name, then the body's, then the one that transformers made."""
    return ask.request_id if ask.request_id and not names_itself.get() else request_id


class ChatHandler(ChatCompletionHandler):
    """/v1/chat/completions."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.manager, served.state)
        self._served = served

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        ask = read(body, ChatAsk)
        self._served.check_model(ask)
        prompt = await asyncio.to_thread(self._prompt, ask)
        return await answered(
            _Answering(self._served, ask, f"chatcmpl-{named(ask, request_id)}", [prompt]),
            "chat.completion",
        )

    def _prompt(self, ask: ChatAsk) -> list[int]:
        tokenizer = self._served.generator.tokenizer
        messages = [_message(one) for one in ask.messages]
        if not messages:
            raise Refused("messages is empty; give at least one.", "messages")
        try:
            text = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=ask.add_generation_prompt,
                continue_final_message=ask.continue_final_message,
                **ask.chat_template_kwargs,
            )
        except Exception as error:  # of the template's own making: what it raises is not known
            raise Refused(f"the chat template refuses these messages: {error}") from None
        return tokenizer.encode(text, add_special_tokens=ask.add_special_tokens)


class TextHandler(CompletionHandler):
    """/v1/completions."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.manager, served.state)
        self._served = served

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        ask = read(body, CompletionAsk)
        self._served.check_model(ask)
        prompts = [self._ids(one, ask) for one in ask.prompts]
        return await answered(
            _Answering(self._served, ask, f"cmpl-{named(ask, request_id)}", prompts),
            "text_completion",
        )

    def _ids(self, prompt: str | list[int], ask: CompletionAsk) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        tokenizer = self._served.generator.tokenizer
        return tokenizer.encode(prompt, add_special_tokens=ask.add_special_tokens)


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """With its parts as one text, joined as vLLM does."""
    if not isinstance(given.get("role"), str):
        raise Refused("a message has no role; give user, assistant or system.", "messages")
    content = given.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Refused(
                    f"a message has a part of type {kind}; only text is read.", "messages"
                )
            texts.append(part["text"])
        content = "\n".join(texts)
    if content is not None and not isinstance(content, str):
        raise Refused("a message's content is no text.", "messages")
    return {**given, "content": content or ""}


async def answered(answering: _Answering, kind: str) -> StreamingResponse | JSONResponse:
    if answering.ask.stream:
        events = _Events(answering, "chat.completion.chunk" if kind == "chat.completion" else kind)
        return StreamingResponse(
            events.stream(), media_type="text/event-stream", headers=answering.headers()
        )
    choices: dict[int, _Choice] = {one.choice: _Choice() for one in answering.choices}
    with answering.running():
        async for piece in answering.pieces():
            if isinstance(piece, Piece):
                choices[piece.choice].add(piece)
    body = _head(answering, kind)
    body["choices"] = [_whole(answering, at, choices[at]) for at in sorted(choices)]
    body["usage"] = answering.usage(sum(len(one.token_ids) for one in choices.values()))
    ask = answering.ask
    if isinstance(ask, ChatAsk):
        body["prompt_logprobs"] = _prompt_logprobs(answering, 0)
        body["prompt_token_ids"] = answering.prompts[0] if ask.return_token_ids else None
    return JSONResponse(body, headers=answering.headers())


def _head(answering: _Answering, kind: str) -> dict[str, Any]:
    return {
        "id": answering.id,
        "object": kind,
        "created": answering.created,
        "model": answering.served.name,
    }


def _whole(answering: _Answering, at: int, choice: _Choice) -> dict[str, Any]:
    ask, decode = answering.ask, answering.served.decode
    wanted = ask.wanted_logprobs is not None
    common = {
        "index": at,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": choice.token_ids if ask.return_token_ids else None,
    }
    if isinstance(ask, ChatAsk):
        message = {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": []}
        found = logprobs.in_chat(choice.logprobs, decode) if wanted else None
        return {**common, "message": message, "logprobs": found}
    found = logprobs.in_completion(choice.logprobs, decode, 0) if wanted else None
    prompt = answering.choices[at].prompt_ids
    return {
        **common,
        "text": choice.text,
        "logprobs": found,
        "prompt_logprobs": _prompt_logprobs(answering, at),
        "prompt_token_ids": prompt if ask.return_token_ids else None,
    }


def _prompt_logprobs(answering: _Answering, at: int) -> list[Any] | None:
    if answering.ask.prompt_logprobs is None:
        return None
    return logprobs.of_prompt(answering.choices[at].prompt_logprobs, answering.served.decode)


class _Events:
    """A streamed answer, as server-sent events."""

    def __init__(self, answering: _Answering, kind: str) -> None:
        self._answering, self._kind = answering, kind
        self._generated = 0
        self._lengths = [0] * len(answering.choices)  # characters told
        self._begun: set[int] = set()

    async def stream(self) -> AsyncIterator[str]:
        answering = self._answering
        try:
            with answering.running():
                if isinstance(answering.ask, ChatAsk):
                    for one in answering.choices:
                        yield self._event([self._first(one)], first=one)
                async for piece in answering.pieces():
                    if isinstance(piece, int):
                        yield f": queued, {piece} before this request\n\n"
                    elif told := self._piece(piece):
                        yield told
            if answering.ask.include_usage:
                yield self._event([], usage=True)
        except Refused as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"
        yield "data: [DONE]\n\n"

    def _first(self, one: Generation) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": one.choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def _piece(self, piece: Piece) -> str:
        self._generated += len(piece.token_ids)
        ask, decode = self._answering.ask, self._answering.served.decode
        wanted = ask.wanted_logprobs is not None
        if not (piece.text or piece.finish_reason or ask.return_token_ids or wanted):
            return ""  # part of a character, or held back for a stop string
        choice: dict[str, Any] = {"index": piece.choice}
        if isinstance(ask, ChatAsk):
            choice["delta"] = {"content": piece.text}
            choice["logprobs"] = logprobs.in_chat(piece.logprobs, decode) if wanted else None
        else:
            offset = self._lengths[piece.choice]
            choice["text"] = piece.text
            choice["logprobs"] = (
                logprobs.in_completion(piece.logprobs, decode, offset) if wanted else None
            )
            if ask.return_token_ids and piece.choice not in self._begun:
                choice["prompt_token_ids"] = self._answering.choices[piece.choice].prompt_ids
            self._begun.add(piece.choice)
            self._lengths[piece.choice] += len(piece.text)
        choice["finish_reason"] = piece.finish_reason
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if ask.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return self._event([choice])

    def _event(
        self, choices: list[dict[str, Any]], *, first: Generation | None = None, usage: bool = False
    ) -> str:
        ask = self._answering.ask
        body = {**_head(self._answering, self._kind), "choices": choices}
        if first is not None and ask.return_token_ids:
            body["prompt_token_ids"] = first.prompt_ids
        options = ask.stream_options
        if usage or (options is not None and options.continuous_usage_stats):
            body["usage"] = self._answering.usage(self._generated)
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def error_body(error: Refused) -> dict[str, Any]:
    """As vLLM's."""
    kinds = {400: "BadRequestError", 404: "NotFoundError", 401: "AuthenticationError"}
    kind = kinds.get(error.status, "InternalServerError")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.status,
        }
    }
