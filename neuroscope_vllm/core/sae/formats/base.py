"""What all formats share: the steps of a conversion, and the checks on tensors.

A converter reads headers first (`read_info`: shapes, dtypes, configuration; no big tensor);
`load_tensors` then reads the tensors into the one layout of `SAE`. What is not known to be right is
refused by name: an SAE that loads but computes something else is worse than none. Files are found
by `load`; nothing here uses a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.sae import SAE

_KINDS = {"standard": "ReLU", "jumprelu": "JumpReLU", "topk": "TopK", "gated": "gated"}
_TENSORS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
}
FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"} | {"F16", "BF16", "F32", "F64"})
Reader = Callable[[str], Tensor]
"""Reads one tensor by its name in `_TENSORS`, in the shapes of `SAE`."""


class Located(NamedTuple):
    """Files of one SAE, on this machine."""

    source: str  # as the user gave it
    paths: Mapping[str, Path]  # by the names in Format.files, and Format.optional where there
    revision: str | None


class Header(NamedTuple):
    """A tensor that was not read."""

    shape: tuple[int, ...]
    dtype: str  # its name in torch and numpy, or in safetensors


class Description(NamedTuple):
    """What a converter learns from headers and configuration."""

    info: SAEInfo
    subtract_b_dec: bool = False  # the publisher's encoder takes x - b_dec
    unit_decoder: bool = False  # activations count as if each decoder row had norm 1


class Format(NamedTuple):
    """A kind of SAE files."""

    files: tuple[str, ...]  # all must be there
    read_info: Callable[[Located], Description]
    open_tensors: Callable[[Located], AbstractContextManager[Reader]]
    optional: tuple[str, ...] = ()

    @property
    def all_files(self) -> tuple[str, ...]:
        return self.files + self.optional


def load_tensors(found: Located, format: Format) -> SAE:
    """Read an SAE whole, in float32 on the CPU.

    Raises:
        SAEError: As `read_info` does, or a tensor is corrupt, or holds NaN or infinity, as it is
            stored or as it comes out of folding.
    """
    info, subtract_b_dec, unit_decoder = format.read_info(found)
    with format.open_tensors(found) as read:
        # One tensor after the other: never two copies of more than one of them.
        def finite(name: str) -> Tensor:
            return _finite(found, name, read(name).float())

        encoder = _finite(found, "W_enc", read("W_enc").t().contiguous().float())
        decoder = finite("W_dec").contiguous()
        b_dec = finite("b_dec")
        if info.architecture == "gated":
            b_enc, threshold = _merge_gate(encoder, *map(finite, ("b_gate", "b_mag", "r_mag")))
        else:
            b_enc = finite("b_enc")
            threshold = torch.zeros_like(b_enc)
            if info.architecture == "jumprelu":  # one number, or one of each feature
                threshold = finite("threshold").expand_as(b_enc).contiguous()
    if unit_decoder:
        _normalise_decoder(encoder, b_enc, threshold, decoder)
    if subtract_b_dec:
        b_enc = _fold_b_dec(encoder, b_enc, b_dec)
    sae = SAE(encoder.t(), b_enc, threshold, decoder, b_dec, info)
    for name in _TENSORS["jumprelu"]:
        if not _is_finite(getattr(sae, name)):
            raise SAEError(
                f"SAE {found.source} holds numbers so large that {name} overflows float32 once its "
                f"scales are folded in; export it again."
            )
    return sae


def check_headers(
    found: Located, headers: Mapping[str, Header], architecture: str
) -> tuple[int, int]:
    """Check that headers hold an architecture's tensors and nothing else, as floats that agree.

    Returns:
        (d_model, width).

    Raises:
        SAEError: They do not.
    """
    kind, names = _KINDS[architecture], _TENSORS[architecture]
    if missing := [name for name in names if name not in headers]:
        raise SAEError(
            f"SAE {found.source} lacks {', '.join(missing)} (it holds "
            f"{', '.join(sorted(headers)) or 'nothing'}); a {kind} autoencoder has "
            f"{', '.join(names)}."
        )
    if extra := sorted(set(headers) - set(names)):
        raise SAEError(
            f"SAE {found.source} holds {', '.join(extra)} besides {', '.join(names)}, so it "
            f"computes something else than a {kind} autoencoder; choose another."
        )
    for name in names:
        if headers[name].dtype not in FLOATS:
            raise SAEError(
                f"SAE {found.source} stores {name} as {headers[name].dtype}; export it with "
                f"floating-point tensors of 16, 32 or 64 bits."
            )
    return _check_shapes(found, {name: headers[name].shape for name in names})


def check_k(found: Located, k: Any, width: int) -> int:
    """The k of a TopK autoencoder. Raises SAEError if it cannot be one."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= width:
        raise SAEError(
            f"SAE {found.source} has k={k!r}, which is no number of its {width} features; export "
            f"it again."
        )
    return k


def _check_shapes(found: Located, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    encoder = shapes.pop("W_enc")
    if len(encoder) != 2 or min(encoder) < 1:
        raise SAEError(
            f"SAE {found.source} has W_enc of shape {list(encoder)}; it must be [d_model, width]."
        )
    d_model, width = encoder
    wanted = {"W_dec": (width, d_model), "b_dec": (d_model,)}
    for name, shape in shapes.items():
        want = wanted.get(name, (width,))
        if shape != want:
            raise SAEError(
                f"SAE {found.source} has {name} of shape {list(shape)}, which disagrees with W_enc "
                f"{list(encoder)}; it must be {list(want)}."
            )
    return d_model, width


def _finite(found: Located, name: str, tensor: Tensor) -> Tensor:
    if not _is_finite(tensor):
        raise SAEError(
            f"SAE {found.source} holds NaN or infinity in {name}, so its features would mean "
            f"nothing; download or export it again."
        )
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    # The extremes show NaN and infinity alike, and unlike isfinite need no temporaries.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _merge_gate(
    encoder: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor
) -> tuple[Tensor, Tensor]:
    """(b_enc, threshold) of the JumpReLU that a gated autoencoder is; scales `encoder` in place.

    Both of its paths share W_enc: with `pre = exp(r) * (x @ W) + b_mag`, the gate
    `x @ W + b_gate > 0` says `pre > b_mag - exp(r) * b_gate`.
    """
    gain = r_mag.double().exp()
    encoder.mul_(gain.float().unsqueeze(1))
    return b_mag, (b_mag.double() - gain * b_gate.double()).float()


def _normalise_decoder(encoder: Tensor, b_enc: Tensor, threshold: Tensor, decoder: Tensor) -> None:
    """Move each decoder row's norm into the activation of its feature, in place."""
    norm = decoder.norm(dim=1).clamp(min=1e-8)
    decoder.div_(norm.unsqueeze(1))
    encoder.mul_(norm.unsqueeze(1))
    b_enc.mul_(norm)
    threshold.mul_(norm)


def _fold_b_dec(encoder: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """b' such that `(x - b_dec) @ W_enc + b_enc == x @ W_enc + b'`, computed in fp64.

    Args:
        encoder: W_enc by feature, [width, d_model].
    """
    shift = torch.cat([rows.double() @ b_dec.double() for rows in encoder.split(4096)])
    return (b_enc.double() - shift).float()
