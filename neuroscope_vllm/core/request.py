"""What a client may ask of us in a request of its own. Torch-free.

In an HTTP body it is JSON inside `vllm_xargs`, whose values must be strings or numbers:
`"vllm_xargs": {"neuroscope": "{\\"prompt_features\\": \\"all\\"}"}`; offline, a dict or JSON in
`SamplingParams.extra_args`.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, get_args

import msgspec

from neuroscope_vllm.core.access import SECRET_FORM, SECRET_PATTERN
from neuroscope_vllm.core.steering.spec import Op, Positions, SteeringSpec, Unit

KEY = "neuroscope"
_EXAMPLE = (
    'a JSON object in a string, as in "{\\"steer\\": [{\\"op\\": \\"add\\", \\"feature\\": 12,'
    ' \\"value\\": 40}]}"'
)
_EXPECTED = (
    f"give {_EXAMPLE}; known are prompt_features (available or all), stream_secret, steer,"
    " preset and rules"
)
_CHOICES = {"op": get_args(Op), "unit": get_args(Unit), "positions": get_args(Positions)}
_INSIDE = ("steer", "preset", "rules", "prompt_features", "stream_secret")
"""What stands a level too high where it is an extra argument of its own."""


class RequestOptions(SteeringSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of one request: how it is steered, and which features it gets."""

    prompt_features: Literal["available", "all"] = "available"
    """`all`: run every prompt token, whatever the prefix cache holds; slower to the first token."""
    stream_secret: Annotated[str, msgspec.Meta(pattern=SECRET_PATTERN)] | None = None
    """Who does not show it can not read this request."""


def request_options(extra_args: dict[str, Any] | None) -> RequestOptions:
    """Raises ValueError, one sentence that names the field, on anything but known options."""
    for name, value in (extra_args or {}).items():
        if name == KEY:
            continue
        if name.startswith(f"{KEY}_"):
            if isinstance(value, dict):  # the engine's own notes
                continue
            raise ValueError(
                f"vllm_xargs.{name} is reserved; leave it out, or give {KEY} {_EXAMPLE}."
            )
        if name in _INSIDE or difflib.get_close_matches(name, [KEY], 1, 0.85):
            raise ValueError(
                f"vllm_xargs.{name} is nothing we know; did you mean {KEY}? Give it {_EXAMPLE}."
            )
    given = (extra_args or {}).get(KEY)
    if given is None:
        return RequestOptions()
    try:
        if isinstance(given, str):
            return msgspec.json.decode(given, type=RequestOptions)
        return msgspec.convert(given, RequestOptions)
    except msgspec.ValidationError as error:
        raise ValueError(f"vllm_xargs.{KEY}: {error}; {_known(str(error))}.") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"vllm_xargs.{KEY} is not JSON ({error}); {_EXPECTED}.") from None


def _known(error: str) -> str:
    """What to do about an error of msgspec's, which ends with the field's path."""
    field = re.search(r"\.(\w+)`$", error)
    if error.startswith("Invalid enum value") and field is not None and field[1] in _CHOICES:
        return f"known are {', '.join(_CHOICES[field[1]])}"
    if field is not None and field[1] == "stream_secret":
        return f"a stream_secret {SECRET_FORM}"
    return _EXPECTED


def without_secret(given: Any) -> dict[str, Any]:
    """What a client gave that `request_options` has read, but for its secret."""
    options = msgspec.json.decode(given) if isinstance(given, str) else given
    return {name: value for name, value in options.items() if name != "stream_secret"}
