"""One sparse autoencoder, in one layout, whatever file it came from.

`formats` converts each publisher's files into this; `encoder` is the fast path over many rows.
What is here is the definition that both are tested against.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.info import LAYER_NORM, RMS, SAEInfo
from neuroscope_vllm.core.sae.sparse import Reconstruction, count_firings

LAYER_NORM_EPS = 1e-5  # SAELens'


@dataclass(frozen=True, slots=True, eq=False)
class SAE:
    """Parameters of a JumpReLU, ReLU or TopK autoencoder over raw residuals.

    What training subtracted from the input or multiplied it by is folded into these parameters
    (arXiv 2408.05147, appendix A), so `encode` takes the residual stream as the model computes it.
    What cannot be folded is in `info`: `k` and `input_norm`.

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

    @property
    def digest(self) -> str:
        """Tells these weights from others, wherever they lie: of the vectors and 16 features."""
        found = hashlib.blake2b(digest_size=8)
        some = (self.W_enc[:, :16].t(), self.W_dec[:16])
        for tensor in (self.b_enc, self.threshold, self.b_dec, *some):
            found.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

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
        pre, active = self.preactivations(x)
        return torch.where(active, pre, 0.0)

    def preactivations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(pre-activations float32 [n, width], which of them are active bool [n, width])."""
        pre = torch.addmm(self.b_enc.float(), self.normalised(x), self.W_enc.float())
        active = pre > self.threshold.clamp(min=0.0)
        if self.info.k is not None:
            best = pre.topk(self.info.k, dim=1, sorted=False).indices
            active &= torch.zeros_like(active).scatter_(1, best, True)
        return pre, active

    def decode(self, f: Tensor, of: Tensor | None = None) -> Tensor:
        """Reconstruction [n, d_model] float32 of activations [n, width].

        Args:
            of: The rows [n, d_model] that were encoded, whose own norm is given back to the
                reconstruction; needed with `info.input_norm`, and of no effect without.

        Raises:
            SAEError: It is needed and was not given.
        """
        x = torch.addmm(self.b_dec.float(), f.float(), self.W_dec.float())
        return self.restored(x, of)

    def normalised(self, x: Tensor) -> Tensor:
        """Rows x [n, d_model] of any float dtype as the encoder's weights read them, float32."""
        return normalise_rows(x.float(), self.info.input_norm)

    def restored(self, x: Tensor, of: Tensor | None) -> Tensor:
        """Normalised rows x [n, d_model] with the norm of the rows `of` given back to them.

        Raises:
            SAEError: `of` is needed, because of `info.input_norm`, and was not given.
        """
        if self.info.input_norm is None:
            return x
        if of is None:
            raise SAEError(
                f"SAE {self.info.source} normalises each row by itself ({self.info.input_norm}), "
                f"so activations alone do not say how large a row was; give decode the rows too."
            )
        mean, scale = row_norm(of.float(), self.info.input_norm)
        return x * scale + mean

    def reading_rms(self) -> SAE:
        """The same parameters over residuals divided by their RMS (`sae_input` rms, the seed's).

        As it reads them before it normalises, nothing changes where it does so already.
        """
        if self.info.input_norm is not None:
            return self
        return replace(self, info=msgspec.structs.replace(self.info, input_norm=RMS))

    def fvu(self, x: Tensor) -> float:
        """Fraction of variance unexplained over the rows of x [n, d_model], of any number.

        `sum |x - decode(encode(x))|^2 / sum |x - mean(x)|^2`, as in Gemma Scope's notebook. Leave
        special tokens and attention sinks out: one of them can outweigh all other rows.

        Raises:
            SAEError: It is a transcoder, which reconstructs something else than x.
        """
        fit = Reconstruction.empty(self.d_model)
        fit.update(self, x)
        return fit.fvu

    def explained_variance(self, x: Tensor) -> float:
        """`1 - fvu(x)`."""
        return 1.0 - self.fvu(x)

    def l0(self, x: Tensor) -> float:
        """Mean number of active features a row of x [n, d_model], of any number."""
        return count_firings(self, x) / max(len(x), 1)

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


def normalise_rows(x: Tensor, input_norm: str | None) -> Tensor:
    """Each row of x f32 [n, d_model] normalised by itself as `SAEInfo.input_norm` says.

    A row of zeros comes out as NaN, as SAELens' does: no feature is active on it.
    """
    if input_norm is None:
        return x
    mean, scale = row_norm(x, input_norm)
    if input_norm == LAYER_NORM:
        return (x - mean) / (scale + LAYER_NORM_EPS)
    return x / scale


def row_norm(x: Tensor, input_norm: str) -> tuple[Tensor | float, Tensor]:
    """(mean, scale) of each row, as SAELens computes them: its layer_norm is unbiased."""
    if input_norm == LAYER_NORM:
        return x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
    return 0.0, torch.linalg.vector_norm(x, dim=1, keepdim=True) / x.shape[1] ** 0.5
