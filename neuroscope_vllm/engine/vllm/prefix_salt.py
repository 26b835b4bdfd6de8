"""Edited requests share no prefix-cache blocks with others, from the first edited position on.

Blocks before it hold the same keys and values whoever computed them, so a request that is steered
from its first generated token on reuses the prompt of one that is not.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from typing import Any

from neuroscope_vllm.core.steering.settled import Steering, from_dict
from neuroscope_vllm.engine.vllm.ids import STEERING
from neuroscope_vllm.engine.vllm.patching import patching_of

_SALTS = "neuroscope_salts"
_SECRET = uuid.uuid4().hex
"""A client that could write our salt could have others read its unsteered blocks."""


def steering_of(params: Any) -> Steering | None:
    """What `admission` left in SamplingParams; None: the request is not steered."""
    given = (params.extra_args or {}).get(STEERING) if params is not None else None
    return None if given is None else from_dict(given)


def salt_whole(request: Any) -> None:
    """For an EngineCoreRequest that is steered from its first token on: vLLM's own salt does it."""
    steering = steering_of(request.sampling_params)
    if steering is not None and steering.edits_prompt:
        request.cache_salt = f"{request.cache_salt or ''}\0{_SECRET}:{steering.digest}"


def salt_of(steering: Steering, prompt_length: int) -> tuple[int, bytes] | None:
    """A position, and the salt of blocks that end past it; None: `salt_whole` is enough.

    What an answer ran under is not what it would run under as part of a longer prompt, unless all
    positions are treated alike.
    """
    if not steering.splits:
        return None
    return prompt_length, f"{steering.digest}:{prompt_length}".encode()


def salt_from(request: Any, position: int, salt: str) -> None:
    """Blocks of a running Request that end past `position` and are yet to be hashed get a salt."""
    setattr(request, _SALTS, (*_salts(request), (position, salt.encode())))


def salting(hasher: Callable[[Any], list[Any]], block_size: int) -> Callable[[Any], list[Any]]:
    """vLLM's hasher of a Request's new full blocks, of `block_size` tokens, with ours on top."""

    def salted(request: Any) -> list[Any]:
        first = len(request.block_hashes)
        hashes = hasher(request)
        if not hashes:
            return hashes
        salts = _salts(request)
        if not salts:
            return hashes
        ends = ((first + i + 1) * block_size for i in range(len(hashes)))
        return [_salted(block, end, salts) for block, end in zip(hashes, ends, strict=True)]

    return salted


def _salts(request: Any) -> tuple[tuple[int, bytes], ...]:
    found = getattr(request, _SALTS, None)
    if found is None:
        patching = patching_of(request.sampling_params)
        steering = steering_of(request.sampling_params)
        if patching is not None:
            found = patching["salts"]
        else:
            own = salt_of(steering, request.num_prompt_tokens) if steering is not None else None
            found = () if own is None else (own,)
        setattr(request, _SALTS, found)
    return found


def _salted(block: bytes, end: int, salts: tuple[tuple[int, bytes], ...]) -> bytes:
    for position, salt in salts:
        if end > position:
            digest = hashlib.blake2b(block, key=salt[:64], digest_size=min(len(block), 64))
            block = digest.digest()
    return block
