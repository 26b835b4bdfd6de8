"""Small SAEs of known shape, and rows that make them fire as a real one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.sae import SAE


def build_sae(d_model: int = 64, width: int = 512, threshold: float = 10.0) -> SAE:
    """Unit decoder rows, encoder = decoder transposed, thresholds within 4 of the given one."""
    draw = torch.Generator().manual_seed(width)
    directions = torch.randn(width, d_model, generator=draw)
    directions = torch.nn.functional.normalize(directions, dim=1)
    return SAE(
        W_enc=directions.clone().t(),
        b_enc=torch.randn(width, generator=draw) * 2 - 2,
        threshold=torch.rand(width, generator=draw) * 4 + threshold,
        W_dec=directions,
        b_dec=torch.zeros(d_model),
        info=SAEInfo(
            source="test", format="saelens", architecture="jumprelu", d_model=d_model, width=width
        ),
    )


def build_rows(sae: SAE, n: int, active: float = 25.0) -> Tensor:
    """[n, d_model] sums of features of widely different frequency and of exponential strength."""
    draw = torch.Generator().manual_seed(n)
    frequency = torch.logspace(-3.5, 0, sae.width)[torch.randperm(sae.width, generator=draw)]
    frequency = (frequency / frequency.sum() * active).clamp(max=0.9)
    on = torch.rand(n, sae.width, generator=draw) < frequency
    strength = torch.empty(n, sae.width).exponential_(1 / 12, generator=draw) + 6
    noise = torch.randn(n, sae.d_model, generator=draw) * 0.5
    return (on * strength) @ sae.W_dec + noise


@pytest.fixture
def make_sae() -> Callable[..., SAE]:
    return build_sae


@pytest.fixture
def make_rows() -> Callable[..., Tensor]:
    return build_rows
