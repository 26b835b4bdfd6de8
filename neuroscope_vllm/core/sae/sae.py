"""One sparse autoencoder, in one layout, whatever file it came from.

`formats` converts each publisher's files into this; `encoder` is the fast path over many rows.
What is here is the definition that both are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.info import SAEInfo

LAYER_NORM_EPS = 1e-5  # SAELens'


@dataclass(frozen=True, slots=True, eq=False)
class SAE:
    """Parameters of a JumpReLU, ReLU or TopK autoencoder over raw residuals.

    What training subtracted from the input or multiplied it by is folded into these parameters
    (arXiv 2408.05147, appendix A), so `encode` takes the residual stream as the model computes it.
    What cannot be folded, `info.k` and `info.input_norm`, only `encode` and `decode` here know;
    the fast path refuses it (`info.check_served`).

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
        With `info.k`, only the k largest of a row; of features that tie for the last place, as
        many as there is room for. With `info.input_norm`, in the normalised row's units.

        Args:
            x: [n, d_model], any float dtype, raw residuals.

        Returns:
            [n, width] float32, zero where a feature is inactive.
        """
        x = x.float()
        if self.info.input_norm is not None:
            mean, scale = self._row_norm(x)
            eps = LAYER_NORM_EPS if self.info.input_norm == "layer_norm" else 0.0
            x = (x - mean) / (scale + eps)
        pre = torch.addmm(self.b_enc.float(), x, self.W_enc.float())
        active = (pre > self.threshold) & (pre > 0)
        if self.info.k is not None:
            best = pre.topk(self.info.k, dim=1, sorted=False).indices
            active &= torch.zeros_like(active).scatter_(1, best, True)
        return torch.where(active, pre, 0.0)

    def decode(self, f: Tensor, of: Tensor | None = None) -> Tensor:
        """Reconstruction [n, d_model] float32 of activations [n, width].

        Args:
            of: The rows [n, d_model] that were encoded, whose own norm is given back to the
                reconstruction; needed with `info.input_norm`, and of no effect without.

        Raises:
            SAEError: It is needed and was not given.
        """
        x = torch.addmm(self.b_dec.float(), f.float(), self.W_dec.float())
        if self.info.input_norm is None:
            return x
        if of is None:
            raise SAEError(
                f"SAE {self.info.source} normalises each row by itself ({self.info.input_norm}), "
                f"so activations alone do not say how large a row was; give decode the rows too."
            )
        mean, scale = self._row_norm(of.float())
        return x * scale + mean

    def _row_norm(self, x: Tensor) -> tuple[Tensor | float, Tensor]:
        """(mean, scale) of each row, as SAELens computes them: its layer_norm is unbiased."""
        if self.info.input_norm == "layer_norm":
            return x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        return 0.0, x.norm(dim=1, keepdim=True) / self.d_model**0.5

    def fvu(self, x: Tensor) -> float:
        """Fraction of variance unexplained over the rows of x [n, d_model].

        `sum |x - decode(encode(x))|^2 / sum |x - mean(x)|^2`, as in Gemma Scope's notebook. Leave
        special tokens and attention sinks out: one of them can outweigh all other rows.

        Raises:
            SAEError: It is a transcoder, which reconstructs something else than x.
        """
        if self.info.output_point is not None:
            raise SAEError(
                f"SAE {self.info.source} predicts {self.info.output_point} from "
                f"{self.info.hook_point}; compare decode(encode(x)) with the former instead."
            )
        x = x.float()
        residual = (x - self.decode(self.encode(x), of=x)).double().square().sum()
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
