"""dictionary_learning (saprmarks, canrager, andyrdt, …): `ae.pt` + `config.json`.

`ae.pt` is a pickle. It is read by torch's weights-only unpickler, which builds tensors and plain
containers and nothing else.
"""

from __future__ import annotations

import pickle  # noqa: TID251  (for the name of its error)
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
    check_k,
)
from neuroscope_vllm.core.sae.formats.files import (
    check_sizes,
    integer,
    read_json,
    section,
    text,
    transposed,
)
from neuroscope_vllm.core.sae.info import RESID_POST, SAEInfo

_WEIGHTS, _CONFIG = "ae.pt", "config.json"


class _Class(NamedTuple):
    """What one of its classes stores and computes."""

    architecture: str
    names: dict[str, str]  # {ours: theirs}
    subtract_b_dec: bool
    unit_decoder: bool = False
    unused: tuple[str, ...] = ()


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_LINEAR_WEIGHTS = ("encoder.weight", "decoder.weight")  # [out, in], as torch's Linear stores them
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_CLASSES = {
    # Its from_pretrained normalises the decoder, so its activations are of unit directions.
    "AutoEncoder": _Class("standard", _LINEAR | {"b_dec": "bias"}, True, unit_decoder=True),
    "AutoEncoderNew": _Class("standard", _LINEAR | {"b_dec": "decoder.bias"}, False),
    "GatedAutoEncoder": _Class(
        "gated",
        {
            "W_enc": "encoder.weight",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
            "r_mag": "r_mag",
            "W_dec": "decoder.weight",
            "b_dec": "decoder_bias",
        },
        True,
    ),
    "JumpReluAutoEncoder": _Class("jumprelu", _PLAIN, False),
    # It stores a threshold too, but encodes by the k largest.
    "AutoEncoderTopK": _Class(
        "topk", _LINEAR | {"b_dec": "b_dec"}, True, unused=("k", "threshold")
    ),
    "BatchTopKSAE": _Class(
        "jumprelu",
        _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"},
        True,
        unused=("k",),
    ),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", _PLAIN, True, unused=("k", "group_sizes")),
}


def read_info(found: Located) -> Description:
    """Check the configuration and the headers of the weights.

    Raises:
        SAEError: Corrupt, malformed, more than tensors, or a class that is not known.
    """
    trainer, kind = _configuration(found)
    state = _load(found, "meta")
    headers = {
        ours: _header(ours, theirs, state[theirs])
        for ours, theirs in kind.names.items()
        if theirs in state
    }
    known = {*kind.names.values(), *kind.unused}
    headers |= {name: _header(name, name, t) for name, t in state.items() if name not in known}
    if "threshold" in headers and headers["threshold"].shape == () and "b_enc" in headers:
        # One number for all features.
        headers["threshold"] = headers["threshold"]._replace(shape=headers["b_enc"].shape)
    d_model, width = check_headers(found, headers, kind.architecture)
    check_sizes(found, trainer, {"activation_dim": d_model, "dict_size": width})
    layer, hook_point = _place(found, trainer)
    info = SAEInfo(
        source=found.source,
        revision=found.revision,
        format="dictionary-learning",
        architecture=kind.architecture,
        d_model=d_model,
        width=width,
        layer=layer,
        hook_point=hook_point,
        model_name=text(found, trainer, "lm_name"),
        k=check_k(found, trainer.get("k"), width) if kind.architecture == "topk" else None,
    )
    return Description(info, kind.subtract_b_dec, kind.unit_decoder)


@contextmanager
def open_tensors(found: Located) -> Iterator[Reader]:
    """A function that reads one tensor by name."""
    trainer, kind = _configuration(found)
    state = _load(found, "cpu")
    stated = integer(found, trainer, "k")
    if "k" in state and (k := state["k"].tolist()) != stated:
        raise SAEError(
            f"SAE {found.source} has k={k} in {_WEIGHTS} but k={stated!r} in {_CONFIG}; "
            f"give files that belong together."
        )

    def read(name: str) -> Tensor:
        theirs = kind.names[name]
        # A copy: tied weights share memory, and folding works in place.
        tensor = state.pop(theirs).detach().clone()
        return tensor.t() if theirs in _LINEAR_WEIGHTS else tensor

    yield read


def _configuration(found: Located) -> tuple[dict[str, Any], _Class]:
    trainer = section(found, read_json(found, _CONFIG), "trainer")
    name = text(found, trainer, "dict_class")
    if name not in _CLASSES:
        raise SAEError(
            f"SAE {found.source} has dict_class {name!r} in its {_CONFIG}; choose one of "
            f"{', '.join(_CLASSES)}."
        )
    return trainer, _CLASSES[name]


def _place(found: Located, trainer: dict[str, Any]) -> tuple[int | None, str]:
    """(layer, hook point): the library hooks the output of a layer unless it names another."""
    layer, module = integer(found, trainer, "layer"), text(found, trainer, "submodule_name")
    if module is None or "resid_post" in module:
        module = RESID_POST
    return layer, module


def _header(ours: str, theirs: str, tensor: Tensor) -> Header:
    dtype = str(tensor.dtype).removeprefix("torch.")
    header = Header(tuple(tensor.shape), dtype)
    return transposed(header) if theirs in _LINEAR_WEIGHTS and ours != theirs else header


def _load(found: Located, device: str) -> dict[str, Tensor]:
    try:
        state = torch.load(  # noqa: TID251  (weights only)
            found.paths[_WEIGHTS], map_location=device, weights_only=True
        )
    except pickle.UnpicklingError as error:
        raise SAEError(
            f"SAE {found.source} is a pickle of more than tensors ({_WEIGHTS}), and pickles can "
            f"run code when opened; save its state_dict alone."
        ) from error
    except NotImplementedError as error:  # torch's, of quantized and nested tensors on meta
        raise _not_plain(found, "a tensor") from error
    except Exception as error:  # of any type: bytes that are no pickle can say anything
        raise SAEError(
            f"SAE {found.source} has truncated or corrupt weights "
            f"({' '.join(str(error).split())}); download it again."
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()
    ):
        raise SAEError(
            f"SAE {found.source} has an {_WEIGHTS} that is not a state_dict of tensors; save its "
            f"state_dict alone."
        )
    for name, tensor in state.items():
        if not _is_stored(tensor, device):
            raise _not_plain(found, name)
    return state


def _is_stored(tensor: Tensor, device: str) -> bool:
    """Whether a tensor is dense, strided, on the device, and stores each of its numbers."""
    return (
        tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_quantized)
        and tensor.device.type == device
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
    )


def _not_plain(found: Located, name: str) -> SAEError:
    return SAEError(
        f"SAE {found.source} has {name} in its {_WEIGHTS} as no plain tensor with all its numbers "
        f"(it is sparse, nested, quantized, expanded or on no device); save it as a contiguous "
        f"tensor on the CPU."
    )
