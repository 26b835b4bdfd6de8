"""Joint firings on disk: one safetensors file for each pair of SAEs, beside what else is known of
the later one."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.causal.firings import JointFirings, LayerFirings
from neuroscope_vllm.core.causal.pair import Pair
from neuroscope_vllm.core.errors import ConfigError

_METADATA = "neuroscope"
_TYPES = {"start": torch.int64, "feature": torch.int32, "activation": torch.float32}


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """Where joint firings are from.

    Attributes:
        lower_digest, upper_digest: Of the SAEs' weights.
        model, corpus: For people.
        created: ISO date.
        sequences: Samples.
        tokens: Those that were counted.
        left_out: Special tokens, and attention sinks of either layer.
    """

    lower_digest: str
    upper_digest: str
    model: str
    corpus: str
    created: str
    sequences: int
    tokens: int
    left_out: int


def firings_file(pair: Pair) -> Path:
    """Where a pair's firings are kept."""
    home = artefacts.home(pair.upper.info.source)
    return home / f"firings-with-{pair.lower.digest}.safetensors"


def save_firings(path: Path, firings: JointFirings, observation: Observation) -> None:
    """Replaces what is there, whole or not at all. Raises OSError."""
    tensors = {
        f"{layer}.{name}": tensor
        for layer, of in (("lower", firings.lower), ("upper", firings.upper))
        for name, tensor in of._asdict().items()
    }
    note = {_METADATA: msgspec.json.encode(observation).decode()}
    artefacts.write_whole(path, save(tensors, note))


def load_firings(path: Path, pair: Pair) -> tuple[JointFirings, Observation]:
    """
    Raises:
        ConfigError: The file can not be read, or is of other weights.
    """
    try:
        with safe_open(path, "pt") as file:
            note = (file.metadata() or {})[_METADATA]
            observation = msgspec.json.decode(note, type=Observation)
            lower, upper = (_layer(file, layer) for layer in ("lower", "upper"))
        found = JointFirings(lower, upper, pair.lower.width, pair.upper.width)
        digests = (observation.lower_digest, observation.upper_digest)
        if digests != (pair.lower.digest, pair.upper.digest):
            raise ValueError("it was made with other weights")
        _check(found, observation.tokens)
    except (OSError, KeyError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"firings {path} can not be used ({error}); make them again with --corpus, or delete"
            " the file."
        ) from error
    return found, observation


def _layer(file: safe_open, layer: str) -> LayerFirings:
    tensors: dict[str, Tensor] = {name: file.get_tensor(f"{layer}.{name}") for name in _TYPES}
    wrong = [n for n, t in tensors.items() if t.dtype != _TYPES[n] or t.ndim != 1]
    if wrong:
        raise ValueError(f"{layer}.{wrong[0]} is of another kind")
    return LayerFirings(**tensors)


def _check(found: JointFirings, tokens: int) -> None:
    """Raises ValueError: Its parts do not fit together."""
    for layer, width in ((found.lower, found.lower_width), (found.upper, found.upper_width)):
        start, feature = layer.start, layer.feature
        bounds = len(start) and (int(start[0]), int(start[-1])) == (0, len(feature))
        if not bounds or len(start) != tokens + 1 or bool((start.diff() < 0).any()):
            raise ValueError("its tokens do not add up")
        if len(layer.activation) != len(feature) or (
            len(feature) and not 0 <= int(feature.min()) <= int(feature.max()) < width
        ):
            raise ValueError("it has features that the SAE has not")
        if not bool((layer.activation > 0).all() & layer.activation.isfinite().all()):
            raise ValueError("it has activations that are none")
