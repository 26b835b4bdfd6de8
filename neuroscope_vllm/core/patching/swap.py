"""What takes the place of a residual: all of another run's, or only some features of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.steering.arithmetic import change


class Replacement(NamedTuple):
    """What an engine puts in the place of resid_post at one place of a run.

    Attributes:
        layer, position: Where, zero-indexed.
        residual: float32 [d_model].
    """

    layer: int
    position: int
    residual: Tensor


class Swap:
    """From the resid_post of one layer in two runs to what is put from one into the other.

    Edits after a layer change no resid_post of that layer at other positions, so the unpatched
    run's own residuals are right also where several positions of the layer are patched at once.
    """

    def __init__(self, layer: int, into: Tensor, source: Tensor, sae: SAE | None = None) -> None:
        """
        Args:
            into: float32 [n, d_model], of the run that is patched, unpatched.
            source: float32 [m, d_model], of the other.
            sae: Whose features are patched; None: the whole residual is.
        """
        self._layer, self._into, self._source = layer, into, source
        self._sae = sae
        if sae is not None:
            self._present, self._wanted = sae.encode(into), sae.encode(source)

    def replacement(
        self, position: int, source: int, features: Sequence[int] | None = None
    ) -> Replacement:
        """Of one position by another of the source's; of `features` only, or all if None.

        Features are patched as by a `clamp` to the value in the source: the error term stays, and
        an SAE that normalises rows keeps the norm of the run's own.
        """
        if self._sae is None:
            return Replacement(self._layer, position, self._source[source])
        amount = self._wanted[source] - self._present[position]
        chosen = amount.nonzero().squeeze(1) if features is None else torch.tensor(list(features))
        x = self._into[position].expand(len(chosen), -1)
        writing = self._sae.W_dec[chosen].float()
        normed = torch.ones(len(chosen))
        changes = change(amount[chosen], writing, normed, x, self._sae.info.input_norm)
        return Replacement(self._layer, position, self._into[position] + changes.sum(0))
