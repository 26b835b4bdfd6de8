"""What a client may ask of us in a request of its own. Torch-free.

In an HTTP body it is JSON inside `vllm_xargs`, whose values must be strings or numbers:
`"vllm_xargs": {"neuroscope": "{\\"prompt_features\\": \\"all\\"}"}`; offline, a dict or JSON in
`SamplingParams.extra_args`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from neuroscope_vllm.core.steering.spec import SteeringSpec

KEY = "neuroscope"
_EXPECTED = (
    'give a JSON object in a string, as in "{\\"steer\\": [{\\"op\\": \\"add\\", \\"feature\\": 12,'
    ' \\"value\\": 40}]}"; known are prompt_features (available or all), steer, preset and rules'
)


class RequestOptions(SteeringSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of one request: how it is steered, and which features it gets."""

    prompt_features: Literal["available", "all"] = "available"
    """`all`: run every prompt token, whatever the prefix cache holds; slower to the first token."""


def request_options(extra_args: dict[str, Any] | None) -> RequestOptions:
    """Raises ValueError, one sentence that names the field, on anything but known options."""
    given = (extra_args or {}).get(KEY)
    if given is None:
        return RequestOptions()
    try:
        if isinstance(given, str):
            return msgspec.json.decode(given, type=RequestOptions)
        return msgspec.convert(given, RequestOptions)
    except msgspec.ValidationError as error:
        raise ValueError(f"vllm_xargs.{KEY}: {error}; {_EXPECTED}.") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"vllm_xargs.{KEY} is not JSON ({error}); {_EXPECTED}.") from None
