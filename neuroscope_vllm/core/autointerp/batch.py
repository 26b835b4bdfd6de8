"""Questions and answers as OpenAI's batch files, which `vllm run-batch` reads too. Torch-free.

{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
{"custom_id": "1", "response": {"status_code": 200, "body": {...}}, "error": null}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from neuroscope_vllm.core.autointerp.answers import json_object, misfit
from neuroscope_vllm.core.autointerp.prices import Price
from neuroscope_vllm.core.autointerp.providers import chat_request
from neuroscope_vllm.core.autointerp.questions import Answer, Question
from neuroscope_vllm.core.autointerp.replies import Completion
from neuroscope_vllm.core.errors import ConfigError

URL = "/v1/chat/completions"
MAX_SAID = 200


class _Response(msgspec.Struct):
    status_code: int = 200
    body: Any = None


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: Any = None


def request_line(question: Question, model: str) -> bytes:
    """One line of a batch's input."""
    body = chat_request(question, model, temperature=0.0, schema=True)
    line = {"custom_id": question.key, "method": "POST", "url": URL, "body": body}
    return msgspec.json.encode(line) + b"\n"


def read_answers(
    path: Path, find: Callable[[str], Question | None], price: Price | None
) -> Iterator[Answer]:
    """The answers in a batch's output.

    Args:
        find: From a `custom_id` to its question; None: that line is passed over.

    Raises:
        ConfigError: The file can not be read, or a line (which is named) is no batch output.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(
            f"results {path} can not be read ({error.strerror}); give the output of a batch."
        ) from error
    for number, written in enumerate(lines, start=1):
        if not written.strip():
            continue
        try:
            line = msgspec.json.decode(written, type=_Line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(
                f"line {number} of {path} is no result of a batch ({error}); give the output that "
                f"`vllm run-batch` or a batch service wrote."
            ) from error
        if (question := find(line.custom_id)) is not None:
            yield _answer(line, question, price)


def _answer(line: _Line, question: Question, price: Price | None) -> Answer:
    response = line.response
    try:
        if line.error is not None or response is None or response.status_code != 200:
            raise msgspec.ValidationError
        found = msgspec.convert(response.body, Completion)
        if found.choices is None:
            raise msgspec.ValidationError
    except msgspec.ValidationError:
        why = line.error or (response.body if response else None)
        said = msgspec.json.encode(why).decode()[:MAX_SAID]
        return Answer(key=question.key, content=None, failure=f"the batch says {said}")
    reply = found.reply()
    content = json_object(reply.text)
    failure = reply.problem or misfit(reply.text, content, question.schema)
    prompt, completion, cost = reply.prompt_tokens, reply.completion_tokens, reply.cost
    return Answer(
        key=question.key,
        content=None if failure else content,
        failure=failure,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=price.of(prompt, completion) if price and cost is None else cost,
        model=reply.model,
    )
