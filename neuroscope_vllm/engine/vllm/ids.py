"""From vLLM's ids to the ones that a client knows."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

CHOICES = "neuroscope_n"
"""Where `admission` leaves `{"n": n}`, for a request's children, which no longer know it. Clients
can send no objects in `vllm_xargs`."""
STEERING = "neuroscope_steering"
"""Where `admission` leaves what a request's steering comes to, as a dict."""
PATCHING = "neuroscope_patching"
"""Where `patch_engine` leaves what is read and replaced in a request, as a dict."""
SECRET = "neuroscope_secret"
"""Where `admission` leaves `{"sha256": hex}` of a request's stream secret, in its place."""
MAX_CHOICES = 1 << 16

_CHILD = re.compile(r"^(\d+)_")
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")
_BEAM = re.compile(r"^(.+)-[0-9a-f]{16,32}-beam-(\d+)$")
_PROMPT = re.compile(r"^((?:cmpl|generative-scoring)-.*)-(\d+)$")
_TURN = re.compile(r"^(resp_.+)_(\d+)$")


class Identity(NamedTuple):
    """`request_id` is the id of the client's answer, `choice` the index of the choice in it."""

    request_id: str
    choice: int
    beam: bool


def identify(internal_id: str, external_id: str | None, params: Any) -> Identity:
    """Who an engine's request is; `params` are its SamplingParams.

    vLLM puts `<i>_` in front of the id of choice i under n > 1, and random hex behind all; a
    /v1/completions call has a request `cmpl-…-<i>` for each of its prompts, whose choices are
    numbered through; a /v1/responses call has a request `resp_…_<i>` for each turn between calls
    of vLLM's own tools; beam search has a request `…-beam-<i>` for each token of each beam.
    """
    external = external_id or _SUFFIX.sub("", internal_id)
    child = _CHILD.match(internal_id)
    is_child = child is not None and internal_id[child.end() :].startswith(external)
    choice = int(child.group(1)) if child is not None and is_child else 0
    # A client may choose an id like that too, but not also what beam search asks of the engine.
    beam = _BEAM.match(external)
    if beam and params.max_tokens == 1 and not params.detokenize:
        return Identity(beam[1], int(beam[2]), beam=True)
    if prompt := _PROMPT.match(external):
        return Identity(prompt[1], int(prompt[2]) * _choices(params) + choice, beam=False)
    if turn := _TURN.match(external):
        return Identity(turn[1], int(turn[2]), beam=False)
    return Identity(external, choice, beam=False)


def _choices(params: Any) -> int:
    noted = (params.extra_args or {}).get(CHOICES)
    n = noted.get("n") if isinstance(noted, dict) else None
    return n if type(n) is int and 0 < n < MAX_CHOICES else 1


def secret_of(params: Any) -> bytes | None:
    """Digest of the stream secret that the request was sent with, if any."""
    noted = (params.extra_args or {}).get(SECRET)
    return bytes.fromhex(noted["sha256"]) if noted else None
