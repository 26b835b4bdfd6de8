"""Two ways to ask a language model: any server of OpenAI's API, and Anthropic's own. Torch-free.

The vendors' clients speak HTTP; retries are `llm`'s, which has to know of each attempt.
"""

from __future__ import annotations

import email.utils
import os
import time
from contextlib import AsyncExitStack
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from neuroscope_vllm.core.autointerp.prices import Price
from neuroscope_vllm.core.autointerp.questions import Question
from neuroscope_vllm.core.autointerp.replies import Completion, Message, Models, Reply, unreadable
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import clean_label

OPENROUTER = "https://openrouter.ai/api/v1"
ANTHROPIC = "https://api.anthropic.com"
_KEYS = {
    "openrouter.ai": "OPENROUTER_API_KEY",
    "api.openai.com": "OPENAI_API_KEY",
    "api.anthropic.com": "ANTHROPIC_API_KEY",
}
OTHER_KEY = "LLM_API_KEY"
"""Of any other server, so that no vendor's key is sent to another."""
MAX_SAID = 300
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Refused(Exception):
    """The server refuses the request, and will again."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TryLater(Exception):
    """The request failed and may succeed if it is sent again.

    Attributes:
        wait: Seconds the server asks to wait, if it does.
        is_too_many: It came too soon.
        may_be_billed: It was sent and broke off, so it may have been answered.
    """

    def __init__(
        self,
        message: str,
        *,
        wait: float | None = None,
        is_too_many: bool = False,
        may_be_billed: bool = False,
    ) -> None:
        super().__init__(message)
        self.wait = wait
        self.is_too_many = is_too_many
        self.may_be_billed = may_be_billed


class Provider(Protocol):
    async def ask(self, question: Question, *, temperature: float | None, schema: bool) -> Reply:
        """Send a question once.

        Args:
            temperature: None: as the server has it.
            schema: Whether to hand the schema to the server.

        Raises:
            Refused, TryLater: There is no reply.
        """
        ...


def open_provider(
    kind: str,
    base_url: str,
    model: str,
    timeout: float,
    most: Price | None,
    closing: AsyncExitStack,
) -> Provider:
    """A client, closed with the stack.

    Args:
        most: What a token may cost at most, where the server chooses among sellers.

    Raises:
        ConfigError: Its package is not installed, or there is no key for it.
    """
    sdk = _package(kind)
    given = {"base_url": base_url, "timeout": timeout, "max_retries": 0}
    key = api_key(base_url) or "none"
    if kind == "anthropic":
        client = sdk.AsyncAnthropic(api_key=key, **given)
        provider: Provider = _Anthropic(sdk, client, model)
    else:
        client = sdk.AsyncOpenAI(api_key=key, **given)
        provider = _OpenAI(sdk, client, model, most)
    closing.push_async_callback(client.close)
    return provider


def api_key(base_url: str, is_needed: bool = True) -> str | None:
    """The key for a server, from the environment.

    Raises:
        ConfigError: There is none, and the server is known to want one.
    """
    host = urlsplit(base_url).hostname or ""
    variable = _KEYS.get(host, OTHER_KEY)
    key = os.environ.get(variable, "").strip()
    if not key and is_needed and host in _KEYS:
        raise ConfigError(
            f"{host} wants a key and {variable} is not set; set it, or name another server with "
            f"--base-url."
        )
    return key or None


def _package(kind: str) -> Any:
    try:
        import jsonschema  # noqa: F401  # `answers` needs it; better said before anything is paid

        if kind == "anthropic":
            import anthropic as sdk
        else:
            import openai as sdk
    except ImportError as error:
        raise ConfigError(
            f"asking a language model needs the packages {kind} and jsonschema ({error}); "
            f"pip install 'neuroscope-vllm[label]'."
        ) from error
    return sdk


class _OpenAI:
    """Any server of OpenAI's chat completions."""

    def __init__(self, sdk: Any, client: Any, model: str, most: Price | None) -> None:
        self._sdk, self._client, self._model, self._most = sdk, client, model, most
        self._host = urlsplit(str(client.base_url)).hostname or ""

    async def ask(self, question: Question, *, temperature: float | None, schema: bool) -> Reply:
        request = chat_request(question, self._model, temperature=temperature, schema=schema)
        extra: dict[str, Any] = {}
        if self._host == "api.openai.com":  # newer models refuse the name that all others know
            request["max_completion_tokens"] = request.pop("max_tokens")
        if self._host == "openrouter.ai":
            extra["provider"] = self._routing(schema)
        create = self._client.chat.completions.with_raw_response.create
        try:
            sent = await create(**request, extra_body=extra)
        except self._sdk.APIError as error:
            raise _failure(self._sdk, error) from error
        try:
            found = msgspec.json.decode(sent.http_response.content, type=Completion)
        except _MALFORMED as error:
            return unreadable(error)
        # Routers report what happened behind them in an answer of status 200.
        if found.error and not found.choices:
            code = found.error.get("code") if isinstance(found.error, dict) else None
            raise _by_status(code if isinstance(code, int) else 500, _words(found.error), None)
        return found.reply()

    def _routing(self, schema: bool) -> dict[str, Any]:
        """Only sellers that know what is asked of them, none dearer than was reckoned with."""
        routing: dict[str, Any] = {"require_parameters": schema}
        if self._most is not None:
            routing["max_price"] = {
                "prompt": self._most.prompt * 1e6,
                "completion": self._most.completion * 1e6,
            }
        return routing


class _Anthropic:
    """Anthropic's messages, whose newer models choose the temperature themselves."""

    def __init__(self, sdk: Any, client: Any, model: str) -> None:
        self._sdk, self._client, self._model = sdk, client, model

    async def ask(self, question: Question, *, temperature: float | None, schema: bool) -> Reply:
        sdk = self._sdk
        given: dict[str, Any] = {}
        if schema:
            form = {"type": "json_schema", "schema": sdk.transform_schema(question.schema)}
            given["output_config"] = {"format": form}
        try:
            sent = await self._client.messages.with_raw_response.create(
                model=self._model,
                max_tokens=question.max_tokens,
                system=_system(question, schema),
                messages=[{"role": "user", "content": question.user}],
                **given,
            )
        except sdk.APIError as error:
            raise _failure(sdk, error) from error
        try:
            return msgspec.json.decode(sent.http_response.content, type=Message).reply()
        except _MALFORMED as error:
            return unreadable(error)


async def list_models(base_url: str, timeout: float) -> list[dict[str, Any]]:
    """What a server of OpenAI's API lists.

    Raises:
        ConfigError: Its package is not installed.
        Refused, TryLater: There is no list.
    """
    sdk = _package("openai")
    key = api_key(base_url, is_needed=False) or "none"
    try:
        async with sdk.AsyncOpenAI(
            api_key=key, base_url=base_url, timeout=timeout, max_retries=0
        ) as client:
            sent = await client.models.with_raw_response.list()
        return msgspec.json.decode(sent.http_response.content, type=Models).data
    except sdk.APIError as error:
        raise _failure(sdk, error) from error
    except _MALFORMED as error:
        raise TryLater(f"what came is no list of models ({error})") from error


def chat_request(
    question: Question, model: str, *, temperature: float | None, schema: bool
) -> dict[str, Any]:
    """The body of a request to `/v1/chat/completions`."""
    request: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": _system(question, schema)},
            {"role": "user", "content": question.user},
        ],
        "max_tokens": question.max_tokens,
    }
    if temperature is not None:
        request["temperature"] = temperature
    if schema:
        form = {"name": "answer", "strict": True, "schema": question.schema}
        request["response_format"] = {"type": "json_schema", "json_schema": form}
    return request


def _system(question: Question, schema: bool) -> str:
    if schema:
        return question.system
    form = msgspec.json.encode(question.schema).decode()
    return f"{question.system}\n\nAnswer with one JSON object of this schema, only: {form}"


def _failure(sdk: Any, error: Any) -> Refused | TryLater:
    """What an error of either client means."""
    if isinstance(error, sdk.APIStatusError):
        return _by_status(error.status_code, _said(error), error.response.headers)
    if isinstance(error, sdk.APITimeoutError):
        return TryLater("the server did not answer in time", may_be_billed=not _unsent(error))
    if isinstance(error, sdk.APIConnectionError):
        cause = error.__cause__ or error
        return TryLater(f"no connection ({cause})", may_be_billed=not _unsent(error))
    return TryLater(f"the answer can not be read ({_said(error)})", may_be_billed=True)


def _unsent(error: BaseException) -> bool:
    """Whether a request failed before it left."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")


def _by_status(status: int, message: str, headers: Any) -> Refused | TryLater:
    if status in (408, 409, 425, 429) or status >= 500:
        said = f"the server said {status} ({message})"
        return TryLater(
            said,
            wait=_retry_after(headers or {}),
            is_too_many=status == 429,
            may_be_billed=status in (408, 504, 524),  # a gateway tired of waiting for the model
        )
    return Refused(status, message)


def _retry_after(headers: Any) -> float | None:
    """Seconds, which servers write as such, in milliseconds, or as a date."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(float(milliseconds) / 1000, 0.0)
        if (written := headers.get("retry-after")) is None:
            return None
        try:
            return max(float(written), 0.0)
        except ValueError:
            return max(email.utils.parsedate_to_datetime(written).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def _said(error: Any) -> str:
    """The server's own words."""
    body = error.body
    return _words((body.get("error") or body) if isinstance(body, dict) else body, error.message)


def _words(error: Any, otherwise: str = "no reason given") -> str:
    """An error in a server's answer, on one line that is safe to print."""
    message = error.get("message") if isinstance(error, dict) else error
    return clean_label(str(message or otherwise), MAX_SAID)
