"""What happens to a request's SamplingParams when they are made.

vLLM's own check of parameters runs in the same place, so what we refuse is a 400 as well, before
an answer begins, and a ValueError offline.
"""

from __future__ import annotations

from typing import Any

from neuroscope_vllm.core.access import digest
from neuroscope_vllm.core.request import KEY, request_options, without_secret
from neuroscope_vllm.core.steering.catalogue import Catalogue
from neuroscope_vllm.core.steering.settle import SteeringRefused, settle
from neuroscope_vllm.engine.vllm.ids import CHOICES, PATCHING, SECRET, STEERING, secret_of

_catalogues: list[Catalogue] = []  # at most one: what this front process's engine steers with


def steer_with(catalogue: Catalogue) -> None:
    """Requests of this process are checked against it from now on."""
    _catalogues[:] = [catalogue]


def refuse_beams(extra_args: dict[str, Any] | None) -> None:
    """Beam search takes no options along, so what would steer it is refused. Raises ValueError."""
    options = request_options(extra_args)
    if options.stream_secret is not None:
        raise ValueError(
            f"vllm_xargs.{KEY}: beam search can not be kept secret in vLLM; leave use_beam_search"
            " out."
        )
    if options.steer or options.preset or options.rules:
        raise ValueError(
            f"vllm_xargs.{KEY}: beam search can not be steered in vLLM; leave use_beam_search out."
        )
    if _catalogues and _catalogues[0].operator.rules:
        raise ValueError("beam search can not be held to this server's rules; leave it out.")


def admit(params: Any) -> None:
    """Check and apply the request's options. Raises ValueError on bad ones.

    For processes that take requests from clients. A copy of admitted params may come again.
    """
    given = params.extra_args or {}
    options = request_options(given)
    if _catalogues and PATCHING in given:
        raise ValueError(f"vllm_xargs.{PATCHING} is reserved; leave it out.")
    try:
        secret_of(params)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"vllm_xargs.{SECRET} is reserved; leave it out.") from None
    noted: dict[str, Any] = {}
    if _catalogues:
        try:
            steering = settle(options, _catalogues[0])
        except SteeringRefused as refusal:
            raise ValueError(f"vllm_xargs.{KEY}.{refusal}") from None
        if steering is not None:
            noted[STEERING] = steering.to_dict()
            if steering.reads_prompt:
                params.skip_reading_prefix_cache = True
    if options.prompt_features == "all":
        params.skip_reading_prefix_cache = True
    if options.stream_secret is not None:
        # The engine, its log and the wire to the hub have the digest alone.
        given = {**given, KEY: without_secret(given[KEY])}
        noted[SECRET] = {"sha256": digest(options.stream_secret).hex()}
    if params.n > 1:
        noted[CHOICES] = {"n": params.n}
    if noted or STEERING in given:
        kept = {name: value for name, value in given.items() if name != STEERING}
        params.extra_args = {**kept, **noted}
