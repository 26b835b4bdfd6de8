"""Watch a language model think while vLLM serves it.

`Client` and `AsyncClient` talk to a running server; everything else is imported by its module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroscope_vllm.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    # vLLM imports this package in each of its processes, which need no HTTP client.
    if name in __all__:
        from neuroscope_vllm import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
