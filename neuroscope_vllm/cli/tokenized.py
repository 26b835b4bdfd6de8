"""A text as a model reads it, and its tokens as a reader does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuroscope_vllm.core.errors import ConfigError


def prompt_ids(tokenizer: Any, text: str, chat: bool, model: str) -> list[int]:
    """As vLLM tokenizes a completion, or a chat with one message.

    Raises:
        ConfigError: The model has no chat template, or a broken one.
    """
    if chat:
        messages = [{"role": "user", "content": text}]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        # A template is a program; and a tokenizer without one raises ValueError.
        except Exception as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(
                f"the chat template of {model} can not be used ({reason}); leave --chat out."
            ) from error
    return tokenizer.encode(text, add_special_tokens=not chat)


def check_text(text: str, what: str) -> None:
    """Raises ConfigError: `what` was given as bytes that are not text in UTF-8."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError(f"{what} {text!r} is not text in UTF-8; give text.")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each, "" of those that a character is not yet complete with."""
    from neuroscope_vllm.core.detokenize import TextStream

    # None of a tokenizer that is not one of the tokenizers library: text is then shown by id.
    fast = getattr(tokenizer, "backend_tokenizer", None)
    stream = TextStream(fast, [], skip_special_tokens=False)
    return [stream.step(token_id) for token_id in ids]
