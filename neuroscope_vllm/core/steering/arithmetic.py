"""The arithmetic of edits, which every engine applies. In fp32, whatever the model runs in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.sae.sae import SAE, normalise_rows, row_norm

_FEATURES_AT_ONCE = 8192
"""Their vectors are multiplied number by number, which takes a copy."""


class Vector(NamedTuple):
    """What a slot reads and writes, float32 on the CPU.

    Attributes:
        reading: [d_model], the feature's column of W_enc; zeros for a direction.
        writing: [d_model], the feature's row of W_dec, or the direction.
        bias, threshold: Of the feature.
        normed: 1.0 where `writing` is in units of the row's own norm (`SAEInfo.input_norm`).
        sink_norm: Norm above which a row is an attention sink, on which no feature is active.
    """

    reading: Tensor
    writing: Tensor
    bias: float
    threshold: float
    normed: float
    sink_norm: float


def feature_vector(sae: SAE, feature: int, sink_norm: float = float("inf")) -> Vector:
    return Vector(
        sae.W_enc[:, feature].float().cpu(),
        sae.W_dec[feature].float().cpu(),
        float(sae.b_enc[feature]),
        max(float(sae.threshold[feature]), 0.0),
        float(sae.info.input_norm is not None),
        sink_norm,
    )


def gains(sae: SAE) -> Tensor:
    """float32 [width] on the CPU: w_enc · d of each feature, how much of what is added along its
    decoder vector its encoder reads. 1 where they are tied; trained ones read less."""
    blocks = zip(
        sae.W_enc.split(_FEATURES_AT_ONCE, 1), sae.W_dec.split(_FEATURES_AT_ONCE), strict=True
    )
    return torch.cat(
        [torch.linalg.vecdot(enc.t().float(), dec.float()).cpu() for enc, dec in blocks]
    )


def ablating(gain: float) -> float:
    """How many times f has to be taken away along d until the encoder reads 0 of a raw residual.

    Never less than once, which takes the feature out of the SAE's reconstruction.
    """
    return max(1.0, 1.0 / gain)


def direction_vector(direction: Tensor) -> Vector:
    """Of a vector [d_model], any float dtype."""
    writing = direction.float().cpu()
    never = float("inf")
    return Vector(torch.zeros_like(writing), writing, 0.0, never, 0.0, never)


def activations(
    x: Tensor,
    reading: Tensor,
    bias: Tensor,
    threshold: Tensor,
    sink_norm: Tensor,
    input_norm: str | None,
) -> Tensor:
    """f of one feature on each row: JumpReLU, as `SAE.encode`; 0 on attention sinks, whose norm
    drowns every feature.

    Args:
        x: float32 [n, d_model], raw residuals.
        reading: float32 [n, d_model], the feature of each row.
        bias, threshold, sink_norm: float32 [n].
        input_norm: As in `SAEInfo`.

    Returns:
        float32 [n].
    """
    pre = torch.linalg.vecdot(normalise_rows(x, input_norm), reading) + bias
    heard = torch.linalg.vector_norm(x, dim=1) <= sink_norm
    return torch.where((pre > threshold) & heard, pre, 0.0)


def change(amount: Tensor, writing: Tensor, normed: Tensor, x: Tensor, norm: str | None) -> Tensor:
    """`amount` of each row's vector, [n, d_model]; amount, normed: float32 [n]."""
    if norm is not None:
        _, scale = row_norm(x, norm)
        amount = amount * torch.where(normed > 0, scale.squeeze(1), 1.0)
    return amount.unsqueeze(1) * writing
