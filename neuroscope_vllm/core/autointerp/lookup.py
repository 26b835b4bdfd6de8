"""Which model a server has, and what it costs, from the server's own list. Torch-free."""

from __future__ import annotations

from typing import Any

import msgspec

from neuroscope_vllm.core.autointerp.llm import LLM
from neuroscope_vllm.core.autointerp.prices import listed_price
from neuroscope_vllm.core.autointerp.providers import Refused, TryLater, list_models
from neuroscope_vllm.core.errors import ConfigError

MOST_NAMED = 8
LIST_TIMEOUT_S = 30.0


async def look_up(llm: LLM) -> LLM:
    """The same, with the model filled in if it is empty, and the price if the server lists it.

    Raises:
        ConfigError: No model is named, and the server does not have exactly one.
    """
    if llm.provider == "anthropic":  # which lists no prices, and many models
        if not llm.model:
            raise ConfigError("--provider anthropic needs --model, such as claude-haiku-4-5.")
        return llm
    if llm.model and llm.price is not None:
        return llm
    try:
        listed = await list_models(llm.base_url, LIST_TIMEOUT_S)
    except (Refused, TryLater) as error:
        if llm.model:
            return llm
        raise ConfigError(
            f"{llm.base_url}/models, asked for the model it serves, failed: {error}; start that "
            f"server, or give --base-url and --model."
        ) from None
    return _filled_in(llm, listed)


def _filled_in(llm: LLM, listed: list[dict[str, Any]]) -> LLM:
    by_name = {str(model.get("id")): model for model in listed}
    name = llm.model or (next(iter(by_name)) if len(by_name) == 1 else "")
    if not name:
        some = ", ".join(list(by_name)[:MOST_NAMED]) or "none"
        raise ConfigError(
            f"{llm.base_url} has {len(by_name):,} models ({some}); name one with --model."
        )
    price = llm.price or listed_price(by_name.get(name, {}))
    return msgspec.structs.replace(llm, model=name, price=price)
