"""Llama Scope (fnlp/Llama3_1-8B-Base-LX*): `hyperparams.json` + `checkpoints/final.safetensors`.

Trained on inputs scaled by `s = sqrt(d_model) / dataset_average_activation_norm`, one factor for
each of input and output. Folded as its authors' lm-saes does for inference
(`standardize_parameters_of_dataset_norm`): b_enc is divided by s_in, b_dec by s_out, W_dec
multiplied by s_in / s_out, and the threshold is one of these raw units already. SAELens folds the
same function into other units: its activations are these times s_in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.formats.base import (
    Description,
    Header,
    Located,
    Reader,
    check_headers,
)
from neuroscope_vllm.core.sae.formats.files import (
    check_sizes,
    number,
    open_safetensors,
    place_of,
    read_json,
    read_tensor,
    refuse_settings,
    safetensors_headers,
    section,
    text,
    transposed,
)
from neuroscope_vllm.core.sae.info import SAEInfo

_CONFIG, _WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_OURS = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


class _Scales(NamedTuple):
    threshold: float
    input: float
    output: float


def read_info(found: Located) -> Description:
    """Check the configuration and the headers of the weights.

    Raises:
        SAEError: Corrupt, malformed, or not a JumpReLU with a norm of the whole dataset.
    """
    config = read_json(found, _CONFIG)
    refuse_settings(
        found,
        {
            "act_fn": (config.get("act_fn"), "jumprelu"),
            "norm_activation": (config.get("norm_activation"), "dataset-wise"),
            "apply_decoder_bias_to_pre_encoder": (
                config.get("apply_decoder_bias_to_pre_encoder"),
                False,
            ),
            "use_glu_encoder": (config.get("use_glu_encoder"), False),
        },
    )
    reads, writes = text(found, config, "hook_point_in"), text(found, config, "hook_point_out")
    if reads is None:
        raise SAEError(
            f"SAE {found.source} does not say what it reads (hook_point_in in {_CONFIG}); download "
            f"it again."
        )
    layer, hook_point = place_of(reads)
    d_model, width = check_headers(found, _headers(found), "jumprelu")
    check_sizes(found, config, {"d_model": d_model, "d_sae": width})
    _scales(found, config)
    info = SAEInfo(
        source=found.source,
        revision=found.revision,
        format="llama-scope",
        architecture="jumprelu",
        d_model=d_model,
        width=width,
        layer=layer,
        hook_point=hook_point,
        model_name="meta-llama/Llama-3.1-8B",
        output_point=None if writes in (None, reads) else writes,
    )
    return Description(info)


@contextmanager
def open_tensors(found: Located) -> Iterator[Reader]:
    """A function that reads one tensor by name, in raw units."""
    threshold, scale_in, scale_out = _scales(found, read_json(found, _CONFIG))
    factor = {"b_enc": 1 / scale_in, "b_dec": 1 / scale_out, "W_dec": scale_in / scale_out}
    with open_safetensors(found, _WEIGHTS) as file:

        def read(name: str) -> Tensor:
            if name == "threshold":
                return torch.tensor(threshold)
            tensor = read_tensor(file, _THEIRS[name])
            tensor = tensor.t() if name.startswith("W") else tensor
            return tensor.float() * factor[name] if name in factor else tensor

        yield read


def _scales(found: Located, config: dict[str, Any]) -> _Scales:
    norms = section(found, config, "dataset_average_activation_norm")
    d_model = number(found, config, "d_model")
    threshold = number(found, config, "jump_relu_threshold")
    norm_in, norm_out = number(found, norms, "in"), number(found, norms, "out")
    if d_model is None or threshold is None or norm_in is None or norm_out is None:
        raise SAEError(
            f"SAE {found.source} lacks d_model, a threshold or a dataset norm in its {_CONFIG}; "
            f"download it again."
        )
    # Python reads NaN, infinity and integers beyond any float from JSON.
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not (
        abs(threshold) < largest
        and all(tiny < value < largest for value in (d_model, norm_in, norm_out))
    ):
        raise SAEError(
            f"SAE {found.source} has a threshold or dataset norm that is no positive number in its "
            f"{_CONFIG}; download it again."
        )
    root = math.sqrt(d_model)
    return _Scales(float(threshold), root / norm_in, root / norm_out)


def _headers(found: Located) -> dict[str, Header]:
    with open_safetensors(found, _WEIGHTS) as file:
        headers = {_OURS.get(name, name): h for name, h in safetensors_headers(file).items()}
    for name in ("W_enc", "W_dec"):
        if name in headers:
            headers[name] = transposed(headers[name])
    if "b_enc" in headers:
        headers["threshold"] = headers["b_enc"]  # one number in the configuration, for all features
    return headers
