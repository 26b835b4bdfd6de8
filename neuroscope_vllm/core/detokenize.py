"""Text of every token, exactly as vLLM's FastIncrementalDetokenizer puts it together.

The texts of a choice's generated tokens, joined, are the text that vLLM returns. A character
split over tokens comes with the token that completes it; the earlier ones have "". With stop
strings, tokens are held back while their text may still turn out to be cut.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

logger = logging.getLogger(__name__)

_INVALID_PREFIX = "Invalid prefix encountered"


def special_ids(tokenizer: Tokenizer | None) -> list[int]:
    """Tokens that are no text but marks, such as the first of every prompt, ascending."""
    added = tokenizer.get_added_tokens_decoder() if tokenizer is not None else {}
    return sorted(token_id for token_id, token in added.items() if token.special)


class Released(NamedTuple):
    """Tokens whose text is final, and how the choice finished, if it did."""

    token_ids: list[int]
    texts: list[str]
    finish_reason: str | None


MOST_WAITING = 24
"""Tokens without a character, of which all but the last few will not become one."""
LAST_FEW = 3
"""They may begin one, which has four bytes at most. Those before them are told: 21, a multiple of
three, so that a run of real U+FFFD, of three bytes each, is cut between two of them."""


class TextStream:
    """Text of one token after another. Without a tokenizer a token is shown as `<id>`.

    Without `spaces_between_special_tokens`, one right after another is its bare content. Bytes that
    are no UTF-8 wait for the rest of a character, as they do in vLLM, and each token decodes all
    that wait; `bounded`, they are told with replacement characters instead, so that a long prompt
    of them takes no longer than another.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: list[int],
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool = True,
        bounded: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._bounded = bounded
        self._waiting: list[int] = []
        self._skip = skip_special_tokens
        self._stream = DecodeStream(ids=prompt_ids, skip_special_tokens=skip_special_tokens)
        self._bare: dict[int, str] = {}
        if tokenizer is not None and not (skip_special_tokens or spaces_between_special_tokens):
            added = tokenizer.get_added_tokens_decoder()
            self._bare = {token_id: token.content for token_id, token in added.items()}
        self._last_special = False

    def step(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"<{token_id}>"
        text = self._decode(self._tokenizer, token_id)
        if self._bounded and not text:
            text = self._wait(self._tokenizer, token_id)
        elif self._waiting:
            self._waiting.clear()
        if self._bare:
            special = self._bare.get(token_id)
            if special is not None and self._last_special:
                text = special
            self._last_special = special is not None
        return text

    def _wait(self, tokenizer: Tokenizer, token_id: int) -> str:
        """The text of those that wait, if they are too many; a new stream begins after them."""
        self._waiting.append(token_id)
        if len(self._waiting) < MOST_WAITING:
            return ""
        told, self._waiting = self._waiting[:-LAST_FEW], self._waiting[-LAST_FEW:]
        self._stream = DecodeStream(ids=self._waiting, skip_special_tokens=self._skip)
        return tokenizer.decode(told, skip_special_tokens=self._skip)

    def _decode(self, tokenizer: Tokenizer, token_id: int) -> str:
        try:
            return self._stream.step(tokenizer, token_id) or ""
        except (OverflowError, TypeError):
            return ""
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            # Some tokenizers decode non-monotonically; vLLM starts a new stream here too
            # (vllm-project/vllm#17448).
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(tokenizer, token_id) or ""


class OutputText:
    """Generated tokens of one choice with their text, released once it is final."""

    def __init__(
        self,
        stream: TextStream,
        *,
        stop: list[str],
        include_stop_str_in_output: bool,
        min_tokens: int = 0,
    ) -> None:
        self._stream = stream
        self._stop = stop
        self._min_tokens = min_tokens
        self._count = 0  # tokens appended
        self._include_stop = include_stop_str_in_output
        holds = bool(stop) and not include_stop_str_in_output
        self._buffer = max(map(len, stop)) - 1 if holds else 0
        self._text = ""
        self._pending: list[tuple[int, int, int]] = []  # token id, text start, text end
        self._cut: int | None = None  # a stop string was seen: the text ends here
        self.stopped_by: str | None = None  # that stop string

    def push(
        self, token_ids: list[int], finish_reason: str | None, stop_reason: int | str | None
    ) -> Released:
        """More tokens were sampled. Raises whatever the tokenizer raises on broken input."""
        by_token = finish_reason == "stop" and not isinstance(stop_reason, str)
        silent_last = by_token and not self._include_stop
        last = len(token_ids) - 1
        texts = [
            "" if silent_last and at == last else self._stream.step(token_id)
            for at, token_id in enumerate(token_ids)
        ]
        if not self._stop:
            return Released(token_ids, texts, finish_reason)
        for token_id, text in zip(token_ids, texts, strict=True):
            self._append(token_id, text)
        if finish_reason is not None and self._cut is not None:
            finish_reason = "stop"
        return self._release(finish_reason)

    def _append(self, token_id: int, text: str) -> None:
        if self._cut is not None:
            return  # sampled before vLLM's front end could tell the engine to stop
        self._count += 1
        start = len(self._text)
        self._text += text
        self._pending.append((token_id, start, len(self._text)))
        if self._count > self._min_tokens:
            self._cut = self._find_stop(len(text))

    def _find_stop(self, new_chars: int) -> int | None:
        """Where the text ends if a stop string was completed by the last `new_chars`."""
        if not new_chars:
            return None
        first_end, cut = len(self._text) + 1, None
        for stop in self._stop:
            at = self._text.find(stop, max(0, len(self._text) + 1 - new_chars - len(stop)))
            if at >= 0 and at + len(stop) < first_end:
                first_end, self.stopped_by = at + len(stop), stop
                cut = first_end if self._include_stop else at
        return cut

    def _release(self, finish_reason: str | None) -> Released:
        end = len(self._text) if self._cut is None else self._cut
        safe = len(self._text) - self._buffer if self._cut is None else self._cut
        count = 0
        for _, _, text_end in self._pending:
            if finish_reason is None and text_end > safe:
                break
            count += 1
        if self._cut is not None and finish_reason is None:
            # The last one: told with the end, or rows of the steps until then would join it.
            count = min(count, len(self._pending) - 1)
        ready, self._pending = self._pending[:count], self._pending[count:]
        ids = [token_id for token_id, _, _ in ready]
        return Released(
            ids, [self._text[min(a, end) : min(b, end)] for _, a, b in ready], finish_reason
        )
