"""Answers in the shapes of vLLM's server, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse

from neuroscope_vllm.engine.hf.serve import logprobs
from neuroscope_vllm.engine.hf.serve.answering import Answering
from neuroscope_vllm.engine.hf.serve.ask import ChatAsk, Refused
from neuroscope_vllm.engine.hf.serve.generation import Generation, Piece


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


async def answered(answering: Answering, kind: str) -> StreamingResponse | JSONResponse:
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


def _head(answering: Answering, kind: str) -> dict[str, Any]:
    return {
        "id": answering.id,
        "object": kind,
        "created": answering.created,
        "model": answering.served.name,
    }


def _whole(answering: Answering, at: int, choice: _Choice) -> dict[str, Any]:
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


def _prompt_logprobs(answering: Answering, at: int) -> list[Any] | None:
    if answering.ask.prompt_logprobs is None:
        return None
    return logprobs.of_prompt(answering.choices[at].prompt_logprobs, answering.served.decode)


class _Events:
    """A streamed answer, as server-sent events."""

    def __init__(self, answering: Answering, kind: str) -> None:
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
    kind = {404: "NotFoundError"}.get(error.status, "BadRequestError")
    if error.status >= 500:
        kind = "InternalServerError"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.status,
        }
    }
