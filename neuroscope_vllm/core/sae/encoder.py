"""The hot path: the k best features of every row, with exact values, in one batched pass.

Selecting and valuing are separate. One GEMM in a cheap dtype looks at all features of all rows and
picks candidates; the few candidates are then recomputed in fp32 and ranked again, so what is
reported does not depend on the selection's precision.

    selection  g = scale * (x @ W_enc + b_enc - threshold)     [n, width], one GEMM
               The ranker's line `scale * a + shift` is folded into the weights, so g > 0 says
               active and `g + scale * threshold + shift` is the score. Nothing else is dense.
    narrowing  (`tail` and `quantile` only, whose line is not their score) the POOL best by the
               line get their real score from the approximate activations. With L0 around 71 nearly
               every row has fewer active features than POOL, and then nothing is lost; on denser
               rows the line ranks well enough that the best few stay within it.
    exact      the `candidates` best are recomputed: fp32 rows of W_enc, strict threshold, score.

An SAE that keeps the `info.k` largest of each row has the pre-activation itself selected, masked
features included; which of the candidates are among those k, and how many, their exact values say.

Shapes are fixed by n, and nothing is read back, so no step waits for a GPU. An encoder owns its
buffers: use it from one thread (and one stream) at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.ranking import Ranker
from neuroscope_vllm.core.sae.info import check_served
from neuroscope_vllm.core.sae.sae import SAE, normalise_rows

POOL = 128
SPARE_CANDIDATES = 4  # near-ties that bf16 may swap across the k-th place
SPARE_SHARE = 4  # of a larger k, one in as many: the longer the list, the closer its last values
SMALL_TOPK = 1 << 14  # elements; below, one topk costs less than the five ops around two
PACK_ROWS = 1 << 15  # features packed at a time: never a second copy of a wide SAE
GEMM_ALIGN = 8  # columns: 16 bytes of bf16, what a GPU GEMM wants of a row


class TopK(NamedTuple):
    """The best features of n rows; rows with fewer than k active are padded with index -1.

    Attributes:
        index: int32 [n, k], best score first.
        activation: float32 [n, k], equal to a full fp32 encode; 0 where padded.
        score: float32 [n, k], by the ranker; 0 where padded.
        l0: int32 [n], active features, masked ones included; from the selection GEMM, so within
            its rounding, but exact for an SAE that keeps the k largest of a row.
    """

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.index)
    activation: Tensor
    score: Tensor
    l0: Tensor


class TopKEncoder:
    """Encodes rows of one layer with one SAE."""

    def __init__(
        self,
        sae: SAE,
        ranker: Ranker,
        k: int = 8,
        *,
        select_dtype: torch.dtype = torch.float32,
        candidates: int | None = None,
        max_chunk_bytes: int = 64 << 20,
    ) -> None:
        """
        Args:
            sae: On the device to encode on.
            ranker: Of the same width, on the same device.
            k: Features to report a row.
            select_dtype: float32 or bfloat16; a CPU that has no bfloat16 selects in float32.
            candidates: Features to recompute in fp32 a row; k, or the SAE's own k where that is
                larger, and some to spare by default.
            max_chunk_bytes: Rows are taken in chunks whose temporaries stay under this.

        Raises:
            ConfigError: k or candidates out of range, a ranker of another width, or another dtype.
            SAEError: The SAE reads something else than the residual stream, or is a transcoder.
        """
        check_served(sae.info)
        width, d_model = sae.width, sae.d_model
        if not 1 <= k <= width:
            raise ConfigError(f"top-k {k} is out of range; the SAE has {width} features.")
        least = max(k, sae.info.k or 0)
        if candidates is not None and candidates < least:
            raise ConfigError(
                f"{candidates} candidates cannot give the top {least}; give at least {least}."
            )
        if select_dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"select dtype {select_dtype} is not float32 or bfloat16; use one.")
        if sae.W_enc.device.type == "cpu" and not _cpu_has_bfloat16():
            select_dtype = torch.float32  # emulated, bfloat16 takes up to five times as long
        if ranker.mask.numel() != width:
            raise ConfigError(
                f"the ranker has {ranker.mask.numel()} features but the SAE has {width}; "
                f"use the calibration of this SAE."
            )
        self.k = k
        self.select_dtype = select_dtype
        self._width = width
        self._d_model = d_model
        self._ranker = ranker
        self._keep = sae.info.k
        self._input_norm = sae.info.input_norm
        spare = max(SPARE_CANDIDATES, (self._keep or 0) // SPARE_SHARE)
        self.candidates = min(width, candidates or least + spare)
        self._pool = self.candidates if ranker.affine else min(width, max(POOL, self.candidates))

        self._rows = sae.W_enc.t().float().contiguous()  # [width, d_model], no copy when it is so
        bias, threshold = sae.b_enc.float(), sae.threshold.float().clamp(min=0.0)
        if self._keep is None:
            # A masked feature's threshold is never passed, whatever its approximate value was.
            strict = threshold.masked_fill(ranker.mask, float("inf"))
            scale, shift = ranker.dense_scale()
            self._line = torch.stack([scale, shift], dim=1)
            offset = (scale * threshold + shift).masked_fill(ranker.mask, float("-inf"))
            self._offset = offset.to(select_dtype)
            self._gemm = _SelectionGemm(self._rows, scale, bias - threshold, select_dtype)
        else:
            strict = threshold
            self._gemm = _SelectionGemm(self._rows, torch.ones_like(bias), bias, select_dtype)
        self._bias_threshold = torch.stack([bias, strict], dim=1)

        row_bytes = max(2 * width * select_dtype.itemsize, self.candidates * d_model * 4)
        self._chunk_rows = max(1, max_chunk_bytes // row_bytes)
        self._flags = torch.empty(0, width, dtype=select_dtype, device=self._rows.device)

    def encode(self, x: Tensor) -> TopK:
        """Encode rows x [n, d_model], any float dtype, raw residuals on the encoder's device."""
        with torch.inference_mode():
            if x.shape[0] <= self._chunk_rows:
                return self._encode_chunk(x)
            parts = [self._encode_chunk(chunk) for chunk in x.split(self._chunk_rows)]
            return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _encode_chunk(self, x: Tensor) -> TopK:
        x = x.float()
        if self._input_norm is not None:
            x = normalise_rows(x, self._input_norm)
        margin = self._gemm(x)
        if self._keep is not None:
            return self._exact_of_kept(x, top_of_blocks(margin, self.candidates)[1], self._keep)
        l0 = self._count_active(margin)
        score = torch.threshold_(margin, 0.0, float("-inf")).add_(self._offset)
        best, index = top_of_blocks(score, self._pool)
        if not self._ranker.affine:
            index = self._narrow(best, index)
        return self._exact(x, index, l0)

    def _count_active(self, margin: Tensor) -> Tensor:
        # Flags of the margin's own dtype: several times faster on a CPU than a bool tensor.
        n = margin.shape[0]
        if self._flags.shape[0] < n:
            self._flags = torch.empty_like(margin)
        flags = torch.gt(margin, 0.0, out=self._flags[:n])
        return flags.sum(dim=1, dtype=torch.float32).int()

    def _narrow(self, line_score: Tensor, index: Tensor) -> Tensor:
        """Of the pool [n, p], the candidates by their real score, from approximate activations."""
        scale, shift = self._line[index].unbind(2)
        score = self._ranker.score(index, (line_score - shift) / scale)
        score = torch.where(line_score == float("-inf"), float("-inf"), score)
        return index.gather(1, score.topk(self.candidates, sorted=False).indices)

    def _exact(self, x: Tensor, index: Tensor, l0: Tensor) -> TopK:
        activation, threshold = self._values(x, index)
        return self._best(index, activation, activation > threshold, l0)

    def _exact_of_kept(self, x: Tensor, index: Tensor, keep: int) -> TopK:
        activation, threshold = self._values(x, index)
        kept = activation.topk(keep, dim=1, sorted=False).indices
        active = torch.zeros_like(index, dtype=torch.bool).scatter_(1, kept, True)
        active &= activation > threshold
        l0 = active.sum(dim=1, dtype=torch.int32)
        return self._best(index, activation, active & ~self._ranker.mask[index], l0)

    def _values(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(exact pre-activation, threshold), f32 [n, m], of features index [n, m]."""
        rows = self._rows.index_select(0, index.view(-1)).view(*index.shape, self._d_model)
        bias, threshold = self._bias_threshold[index].unbind(2)
        # Not bmm: a CPU runs one vector-matrix product a row five times slower than this.
        return rows.mul_(x.unsqueeze(1)).sum(dim=2).add_(bias), threshold

    def _best(self, index: Tensor, activation: Tensor, shown: Tensor, l0: Tensor) -> TopK:
        score = self._ranker.score(index, activation)
        score = torch.where(shown, score, float("-inf"))
        score, place = score.topk(self.k)
        padded = score == float("-inf")
        return TopK(
            index.gather(1, place).masked_fill_(padded, -1).int(),
            activation.gather(1, place).masked_fill_(padded, 0.0),
            score.masked_fill_(padded, 0.0),
            l0,
        )


class _SelectionGemm:
    """`scale * (x @ rows.T + bias)` of all features in the selection dtype.

    The bias rides along as two more columns of x that are always 1: its bf16 value and what that
    rounding lost. A bf16 bias alone would move each feature's threshold by up to 0.4 %.
    """

    def __init__(self, rows: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        width, d_model = rows.shape
        columns = -(-(d_model + 2) // GEMM_ALIGN) * GEMM_ALIGN
        bias = scale * bias

        def weight(features: slice) -> Tensor:
            part = bias[features]
            weight = torch.zeros(part.numel(), columns, dtype=dtype, device=rows.device)
            torch.mul(rows[features], scale[features, None], out=weight[:, :d_model])
            weight[:, d_model] = part
            weight[:, d_model + 1] = part - weight[:, d_model].float()
            return weight

        self._d_model = d_model
        self._packed: list[Tensor] = []
        self._weight = rows.new_empty(0, columns, dtype=dtype)
        if _can_pack(rows.device):
            blocks = (slice(at, at + PACK_ROWS) for at in range(0, width, PACK_ROWS))
            self._packed = [_pack(weight(block)) for block in blocks]
        else:
            self._weight = weight(slice(None))
        self._input = self._weight.new_empty(0, columns)
        self._output = self._weight.new_empty(0, width)

    def __call__(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if self._input.shape[0] < n:
            self._input = self._input.new_zeros(n, self._input.shape[1])
            self._input[:, self._d_model : self._d_model + 2] = 1.0
        augmented = self._input[:n]
        augmented[:, : self._d_model].copy_(x)
        if len(self._packed) == 1:
            return _packed_linear(augmented, self._packed[0])
        if self._output.shape[0] < n:
            self._output = self._output.new_empty(n, self._output.shape[1])
        if self._packed:
            parts = [_packed_linear(augmented, block) for block in self._packed]
            return torch.cat(parts, dim=1, out=self._output[:n])
        return torch.mm(augmented, self._weight.t(), out=self._output[:n])


def _cpu_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _can_pack(device: torch.device) -> bool:
    ops = torch.ops.mkldnn
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_reorder_linear_weight")
    )


def _pack(weight: Tensor) -> Tensor:
    """The weight in oneDNN's blocked layout.

    Saves a CPU the reordering that each plain matmul does, half of the time of a single row. These
    are the ops that inductor emits for a frozen linear; to be replaced when torch has a public way.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, 16)


def _packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def top_of_blocks(score: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m largest of each row of score [n, width], unsorted: (values, int64 index), each [n, m].

    Exact, and several times faster than one topk over the width: the m largest lie in the m blocks
    with the largest maxima. Block j of b holds features j, j + b, j + 2b, ...; its size is the
    power of two that divides the width and comes closest to making both topk equally wide.
    """
    n, width = score.shape
    if n * width <= SMALL_TOPK:
        return score.topk(m, sorted=False)
    size = 1
    while width % (2 * size) == 0 and (2 * size) ** 2 <= width // m:
        size *= 2
    if size == 1:
        return score.topk(m, sorted=False)
    blocks = score.view(n, size, width // size)
    chosen = blocks.amax(dim=1).topk(m, sorted=False).indices
    inside = blocks.gather(2, chosen.unsqueeze(1).expand(n, size, m)).view(n, size * m)
    values, place = inside.topk(m, sorted=False)
    index = chosen.gather(1, place % m).add_(place // m, alpha=width // size)
    return values, index
