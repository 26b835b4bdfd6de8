"""One sparse autoencoder, in one layout, whatever file it came from.

`formats` converts each publisher's files into this; `encoder` is the fast path over many rows.
What is here is the definition that both are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuroscope_vllm.core.sae.info import SAEInfo


@dataclass(frozen=True, slots=True, eq=False)
class SAE:
    """Parameters of a JumpReLU or ReLU autoencoder over raw residuals.

    What training subtracted from the input or multiplied it by is folded into these parameters
    (arXiv 2408.05147, appendix A), so `encode` takes the residual stream as the model computes it.

    Attributes:
        W_enc: [d_model, width]. `load_sae` stores it by feature (its transpose is contiguous),
            as the encoder gathers features.
        b_enc: [width].
        threshold: [width]; zeros for a ReLU autoencoder.
        W_dec: [width, d_model].
        b_dec: [d_model].
        info: Where it came from.
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor
    info: SAEInfo

    @property
    def d_model(self) -> int:
        return self.info.d_model

    @property
    def width(self) -> int:
        return self.info.width

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations of each row, in the residual's own units.

        JumpReLU (arXiv 2408.05147, eq. 3): `f = relu(pre) * (pre > threshold)`, strict, in fp32.

        Args:
            x: [n, d_model], any float dtype, raw residuals.

        Returns:
            [n, width] float32, zero where a feature is inactive.
        """
        pre = torch.addmm(self.b_enc.float(), x.float(), self.W_enc.float())
        active = (pre > self.threshold) & (pre > 0)
        return torch.where(active, pre, 0.0)

    def decode(self, f: Tensor) -> Tensor:
        """Reconstruction [n, d_model] float32 of activations [n, width]."""
        return torch.addmm(self.b_dec.float(), f.float(), self.W_dec.float())

    def fvu(self, x: Tensor) -> float:
        """Fraction of variance unexplained over the rows of x [n, d_model].

        `sum |x - decode(encode(x))|^2 / sum |x - mean(x)|^2`, as in Gemma Scope's notebook. Leave
        special tokens and attention sinks out: one of them can outweigh all other rows.
        """
        x = x.float()
        residual = (x - self.decode(self.encode(x))).double().square().sum()
        total = (x - x.mean(dim=0)).double().square().sum()
        return float(residual / total)

    def explained_variance(self, x: Tensor) -> float:
        """`1 - fvu(x)`."""
        return 1.0 - self.fvu(x)

    def l0(self, x: Tensor) -> float:
        """Mean number of active features a row of x [n, d_model]."""
        return float((self.encode(x) > 0).sum(dim=-1).float().mean())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """The same SAE on another device or in another float dtype."""
        return replace(
            self,
            W_enc=self.W_enc.to(device=device, dtype=dtype),
            b_enc=self.b_enc.to(device=device, dtype=dtype),
            threshold=self.threshold.to(device=device, dtype=dtype),
            W_dec=self.W_dec.to(device=device, dtype=dtype),
            b_dec=self.b_dec.to(device=device, dtype=dtype),
        )
