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
from typing import NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.sae import SAE

RELU_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
JUMPRELU_TENSORS = (*RELU_TENSORS, "threshold")


class Located(NamedTuple):
    """Files of one SAE, on this machine."""

    source: str  # as the user gave it
    paths: Mapping[str, Path]  # by the names in Format.files
    revision: str | None


class Header(NamedTuple):
    """A tensor that was not read."""

    shape: tuple[int, ...]
    dtype: str
    is_float: bool


class Description(NamedTuple):
    """What a converter learns from headers and configuration."""

    info: SAEInfo
    subtract_b_dec: bool  # the publisher's encoder takes x - b_dec


class Format(NamedTuple):
    """A kind of SAE files."""

    files: tuple[str, ...]  # all must be there
    read_info: Callable[[Located], Description]
    open_tensors: Callable[[Located], AbstractContextManager[Callable[[str], Tensor]]]


def load_tensors(found: Located, format: Format) -> SAE:
    """Read an SAE whole, in float32 on the CPU.

    Raises:
        SAEError: As `read_info` does, or a tensor is corrupt or holds NaN or infinity.
    """
    info, subtract_b_dec = format.read_info(found)
    with format.open_tensors(found) as read:
        # One tensor after the other: never two copies of more than one of them.
        encoder = _finite(found, "W_enc", read("W_enc").t().contiguous().float())
        b_enc = _finite(found, "b_enc", read("b_enc").float())
        decoder = _finite(found, "W_dec", read("W_dec").float())
        b_dec = _finite(found, "b_dec", read("b_dec").float())
        threshold = torch.zeros_like(b_enc)
        if info.architecture == "jumprelu":
            threshold = _finite(found, "threshold", read("threshold").float())
    if subtract_b_dec:
        b_enc = _fold_b_dec(encoder, b_enc, b_dec)
    return SAE(encoder.t(), b_enc, threshold, decoder, b_dec, info)


def check_headers(
    found: Located, headers: Mapping[str, Header], names: tuple[str, ...]
) -> tuple[int, int]:
    """Check that headers hold `names` and nothing else, as floats of shapes that agree.

    Returns:
        (d_model, width).

    Raises:
        SAEError: They do not.
    """
    kind = "JumpReLU" if "threshold" in names else "ReLU"
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
        if not headers[name].is_float:
            raise SAEError(
                f"SAE {found.source} stores {name} as {headers[name].dtype}; export it with "
                f"floating-point tensors."
            )
    return _check_shapes(found, {name: headers[name].shape for name in names})


def _check_shapes(found: Located, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    encoder = shapes.pop("W_enc")
    if len(encoder) != 2 or 0 in encoder:
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
    # The extremes show NaN and infinity alike, and unlike isfinite need no temporaries.
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise SAEError(
            f"SAE {found.source} holds NaN or infinity in {name}, so its features would mean "
            f"nothing; download or export it again."
        )
    return tensor


def _fold_b_dec(encoder: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """b' such that `(x - b_dec) @ W_enc + b_enc == x @ W_enc + b'`, computed in fp64.

    Args:
        encoder: W_enc by feature, [width, d_model].
    """
    shift = torch.cat([rows.double() @ b_dec.double() for rows in encoder.split(4096)])
    return (b_enc.double() - shift).float()
