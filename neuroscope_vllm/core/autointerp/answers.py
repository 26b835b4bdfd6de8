"""What a model wrote, as the JSON object it was asked for. Torch-free."""

from __future__ import annotations

from typing import Any

import msgspec

from neuroscope_vllm.core.errors import ConfigError


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in a text: all of it, or between thoughts, fences and remarks; else None."""
    answer = text.rpartition("</think>")[2]
    for candidate in (answer, answer[answer.find("{") : answer.rfind("}") + 1]):
        try:
            return msgspec.json.decode(candidate, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):  # "[[[[[[..."
            continue
    return None


def misfit(text: str, content: dict[str, Any] | None, schema: dict[str, Any]) -> str | None:
    """What is wrong with an answer, in words; None if it fits the schema.

    Raises:
        ConfigError: What checks it is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
    except ImportError as error:
        raise ConfigError(
            f"checking answers needs the package jsonschema ({error}); pip install "
            f"'neuroscope-vllm[label]'."
        ) from error

    if not text.strip():
        return "the answer is empty"
    if content is None:
        return "the answer is not JSON"
    error = best_match(Draft202012Validator(schema).iter_errors(content))
    if error is None:
        return None
    where = ".".join(map(str, error.absolute_path)) or "it"
    return (
        f"the answer breaks the schema ({where}: {error.validator} {error.validator_value!r:.60})"
    )
