"""What the tests of the encoder share: SAEs and rows, a reference, and a look at the ops."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.ranking import Ranker, make_ranker
from neuroscope_vllm.core.sae.encoder import TopK
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sae.sparse import encode_sparse
from tests.core.conftest import build_rows, build_sae

ROWS = 1500


class Bench:
    """An SAE, rows for it, and its calibration; by default of other rows of the same kind."""

    def __init__(self, sae: SAE, x: Tensor, calibration: Calibration | None = None) -> None:
        self.sae, self.x, self.f = sae, x, sae.encode(x)
        if calibration is None:
            calibration = Calibration.empty(sae.width)
            calibration.update(2 * ROWS, encode_sparse(sae, build_rows(sae, 2 * ROWS)))
        self.calibration = calibration

    @classmethod
    def realistic(cls) -> Bench:
        """2,048 features that fire like those of a real one."""
        sae = build_sae(d_model=256, width=2048)
        return cls(sae, build_rows(sae, ROWS))

    def ranker(self, method: str) -> Ranker:
        """Masks the handful that fire on more than a tenth of the rows."""
        return make_ranker(method, self.calibration, 0.1)

    def reference(self, ranker: Ranker, k: int) -> TopK:
        index = torch.arange(self.sae.width).expand_as(self.f)
        shown = (self.f > 0) & ~ranker.mask
        score = torch.where(shown, ranker.score(index, self.f), float("-inf"))
        score, index = score.topk(k)
        padded = score == float("-inf")
        return TopK(
            index.masked_fill(padded, -1).int(),
            self.f.gather(1, index).masked_fill(padded, 0.0),
            score.masked_fill(padded, 0.0),
            (self.f > 0).sum(dim=1).int(),
        )


def membership(ours: TopK, reference: TopK) -> float:
    """Fraction of the reference's features that are among ours."""
    same = (reference.index[:, :, None] == ours.index[:, None, :]).any(dim=2)
    return float(same.float().mean())


def by_hand(threshold: Tensor) -> SAE:
    """Eight features that each read one of eight dimensions."""
    like, eye = build_sae(8, 8), torch.eye(8)
    return SAE(eye, torch.zeros(8), threshold, eye, torch.zeros(8), like.info)


def keeping(sae: SAE, k: int) -> SAE:
    """The same parameters, but of each row only the k largest."""
    info = msgspec.structs.replace(sae.info, k=k, architecture="topk")
    return replace(sae, threshold=torch.zeros_like(sae.threshold), info=info)


class LargestResult(TorchDispatchMode):
    """The largest tensor that any op returns, and the names of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.add(str(func))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Tensor):
                self.nbytes = max(self.nbytes, value.numel() * value.itemsize)
        return result

    def read_back(self) -> list[str]:
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
        return [op for op in self.ops if any(read in op for read in reads)]
