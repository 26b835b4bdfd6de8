"""What `transformers serve` does with chats and completions, as vLLM's server answers them."""

from __future__ import annotations

import asyncio
import secrets
from contextvars import ContextVar
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from neuroscope_vllm.engine.hf.serve.answering import Answering, Served
from neuroscope_vllm.engine.hf.serve.answers import answered
from neuroscope_vllm.engine.hf.serve.ask import Ask, ChatAsk, CompletionAsk, Refused, read

TEXT_PARTS = ("text", "input_text", "output_text")
names_itself: ContextVar[bool] = ContextVar("names_itself", default=False)
"""Whether the request's client sent an X-Request-Id."""


def named(ask: Ask, request_id: str) -> str:
    """The header's name, then the body's, then one as vLLM makes it."""
    if names_itself.get():
        return request_id
    return ask.request_id or secrets.token_hex(8)


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
            Answering(self._served, ask, f"chatcmpl-{named(ask, request_id)}", [prompt]),
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
        return self._served.encode(text, ask)


class TextHandler(CompletionHandler):
    """/v1/completions."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.manager, served.state)
        self._served = served

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        ask = read(body, CompletionAsk)
        self._served.check_model(ask)
        prompts = await asyncio.to_thread(self._prompts, ask)
        return await answered(
            Answering(self._served, ask, f"cmpl-{named(ask, request_id)}", prompts),
            "text_completion",
        )

    def _prompts(self, ask: CompletionAsk) -> list[list[int]]:
        encode = self._served.encode
        return [one if isinstance(one, list) else encode(one, ask) for one in ask.prompts]


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
            if (
                not isinstance(part, dict)
                or part.get("type", "text") not in TEXT_PARTS
                or not isinstance(part.get("text"), str)
            ):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Refused(
                    f"a message has a part of type {kind}; only text is read.", "messages"
                )
            texts.append(part["text"])
        content = "\n".join(texts)
    if content is not None and not isinstance(content, str):
        raise Refused("a message's content is no text.", "messages")
    return {**given, "content": content or ""}
