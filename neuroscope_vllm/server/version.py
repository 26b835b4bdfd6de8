"""Which release this is."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def installed_version() -> str:
    try:
        return metadata.version("neuroscope-vllm")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout
