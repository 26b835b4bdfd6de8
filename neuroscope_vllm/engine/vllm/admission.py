"""What happens to a request's SamplingParams when they are made.

vLLM's own check of parameters runs in the same place, so what we refuse is a 400 as well, before
an answer begins, and a ValueError offline.
"""

from __future__ import annotations

from typing import Any

from neuroscope_vllm.core.request import request_options
from neuroscope_vllm.engine.vllm.ids import CHOICES


def admit(params: Any) -> None:
    """Check and apply the request's options. Raises ValueError on bad ones.

    For processes that take requests from clients. A copy of admitted params may come again.
    """
    options = request_options(params.extra_args)
    if not isinstance((params.extra_args or {}).get(CHOICES, {}), dict):
        raise ValueError(f"vllm_xargs.{CHOICES} is reserved; leave it out.")
    if options.prompt_features == "all":
        params.skip_reading_prefix_cache = True
    if params.n > 1:
        params.extra_args = {**(params.extra_args or {}), CHOICES: {"n": params.n}}
