"""What each feature does on ordinary text: how often it fires and how strongly.

Also how large residuals are, which tells attention sinks. Built from shards of a corpus, on the
CPU; read by `ranking`, steering and the feature card. Counts are
integers and sums are fp64, so shards combine in any order. Leave special tokens and attention sinks
out of what `update` sees: one sink outweighs a shard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuroscope_vllm.core.errors import ConfigError

VERSION = "1"

# Activations, log-spaced: bin 0 holds (0, 2^-4), bins 1 to 64 a quarter of an octave each up to
# 2^12, bin 65 the rest. Residual-stream SAEs fire between about 0.1 and a few hundred.
LOG2_MIN, LOG2_MAX, BINS_PER_OCTAVE = -4, 12, 4
NUM_BINS = (LOG2_MAX - LOG2_MIN) * BINS_PER_OCTAVE + 2

# Residual norms, 64 bins an octave from 2^-8 to 2^20: a median good to 1 %.
NORM_LOG2_MIN, NORM_LOG2_MAX, NORM_BINS_PER_OCTAVE = -8, 20, 64
NUM_NORM_BINS = (NORM_LOG2_MAX - NORM_LOG2_MIN) * NORM_BINS_PER_OCTAVE

# A residual this many times the median norm is an attention sink.
SINK_MULTIPLE = 6.0


@dataclass(slots=True, eq=False)
class Calibration:
    """Statistics per feature over `tokens` tokens, zeros included.

    Attributes:
        tokens: Tokens seen.
        firings: int64 [width], tokens on which the feature was active.
        total: float64 [width], sum of activations.
        total_square: float64 [width], sum of their squares.
        maximum: float32 [width], largest activation; 0 if it never fired.
        histogram: int64 [width, NUM_BINS], firings by activation.
        norm_histogram: int64 [NUM_NORM_BINS], residuals by norm.
        sae, model, corpus: What it was measured with; the same in all that merge.
        created: ISO date.
    """

    tokens: int
    firings: Tensor
    total: Tensor
    total_square: Tensor
    maximum: Tensor
    histogram: Tensor
    norm_histogram: Tensor
    sae: str = ""
    model: str = ""
    corpus: str = ""
    created: str = ""

    @classmethod
    def empty(
        cls, width: int, *, sae: str = "", model: str = "", corpus: str = "", created: str = ""
    ) -> Calibration:
        return cls(
            tokens=0,
            firings=torch.zeros(width, dtype=torch.int64),
            total=torch.zeros(width, dtype=torch.float64),
            total_square=torch.zeros(width, dtype=torch.float64),
            maximum=torch.zeros(width),
            histogram=torch.zeros(width, NUM_BINS, dtype=torch.int64),
            norm_histogram=torch.zeros(NUM_NORM_BINS, dtype=torch.int64),
            sae=sae,
            model=model,
            corpus=corpus,
            created=created,
        )

    @property
    def width(self) -> int:
        return self.firings.numel()

    @property
    def frequency(self) -> Tensor:
        """float64 [width]: fraction of tokens on which each feature fires."""
        return self.firings.double() / max(self.tokens, 1)

    @property
    def mean(self) -> Tensor:
        """float64 [width]: mean activation over all tokens, zeros included."""
        return self.total / max(self.tokens, 1)

    @property
    def std(self) -> Tensor:
        """float64 [width]: population standard deviation over all tokens, zeros included."""
        variance = self.total_square / max(self.tokens, 1) - self.mean.square()
        return variance.clamp(min=0.0).sqrt()

    @property
    def median_norm(self) -> float:
        """Median residual norm, to 1 %; 0 if no norms were seen."""
        count = int(self.norm_histogram.sum())
        if count == 0:
            return 0.0
        middle = int(torch.searchsorted(self.norm_histogram.cumsum(0), (count + 1) // 2))
        return 2.0 ** (NORM_LOG2_MIN + (middle + 0.5) / NORM_BINS_PER_OCTAVE)

    @property
    def sink_norm(self) -> float:
        """Residuals with a norm above this are attention sinks; infinity if no norms were seen."""
        return SINK_MULTIPLE * self.median_norm or float("inf")

    def update(self, activations: Tensor) -> None:
        """Add a batch of tokens: activations [n, width], never negative, of any dtype and device.

        Raises:
            ConfigError: They are of another width.
        """
        num_tokens, width = activations.shape
        if width != self.width:
            raise ConfigError(
                f"activations of {width} features were given to a calibration of {self.width}; "
                f"use the SAE it was made for."
            )
        # 1-D: the 2-D nonzero of torch is several times slower on the CPU.
        flat = activations.reshape(-1)
        where = (flat > 0).nonzero().squeeze(1)
        value = flat[where].float().cpu()
        feature = where.cpu() % width
        self.tokens += num_tokens
        self.firings += torch.bincount(feature, minlength=width)
        self.total.index_add_(0, feature, value.double())
        self.total_square.index_add_(0, feature, value.double().square())
        self.maximum.scatter_reduce_(0, feature, value, "amax")
        cells = feature * NUM_BINS + activation_position(value).long().clamp_(max=NUM_BINS - 1)
        ones = torch.ones_like(cells)
        self.histogram.view(-1).index_add_(0, cells, ones)

    def update_norms(self, norms: Tensor) -> None:
        """Add residual norms [n], sinks and all: the median does not mind them."""
        position = (norms.float().log2() - NORM_LOG2_MIN) * NORM_BINS_PER_OCTAVE
        cells = position.floor().long().clamp(0, NUM_NORM_BINS - 1).cpu()
        self.norm_histogram += torch.bincount(cells, minlength=NUM_NORM_BINS)

    def merge(self, other: Calibration) -> Calibration:
        """Both together, as if one had seen all the tokens.

        Raises:
            ConfigError: They were measured with another SAE, model or corpus.
        """
        for name in ("width", "sae", "model", "corpus"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ConfigError(
                    f"calibrations of {name} {mine!r} and {name} {theirs!r} cannot be merged; "
                    f"calibrate both shards with the same SAE, model and corpus."
                )
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            firings=self.firings + other.firings,
            total=self.total + other.total,
            total_square=self.total_square + other.total_square,
            maximum=torch.maximum(self.maximum, other.maximum),
            histogram=self.histogram + other.histogram,
            norm_histogram=self.norm_histogram + other.norm_histogram,
            created=max(self.created, other.created),
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; `tokens` and the provenance go to its metadata."""
        metadata = {name: getattr(self, name) for name in _TEXTS}
        metadata |= {"neuroscope_calibration": VERSION, "tokens": str(self.tokens)}
        save_file({name: getattr(self, name) for name in _TENSORS}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ConfigError: There is no such file, it is not a calibration, or its version is unknown.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                version = metadata.get("neuroscope_calibration")
                if version != VERSION:
                    raise ConfigError(
                        f"{path} is not a calibration of version {VERSION} (it says "
                        f"{version or 'nothing'}); make one for this "
                        f"version with `examples/train_demo_sae/describe.py`."
                    )
                tensors = {name: file.get_tensor(name).clone() for name in _TENSORS}
        except FileNotFoundError as error:
            raise ConfigError(
                f"calibration {path} does not exist; "
                f"make one with `examples/train_demo_sae/describe.py`."
            ) from error
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"calibration {path} cannot be read ({error}); make it again with "
                f"`examples/train_demo_sae/describe.py`."
            ) from error
        texts = {name: metadata.get(name, "") for name in _TEXTS}
        return cls(tokens=int(metadata["tokens"]), **tensors, **texts)


_TENSORS = ("firings", "total", "total_square", "maximum", "histogram", "norm_histogram")
_TEXTS = ("sae", "model", "corpus", "created")


def activation_position(activation: Tensor) -> Tensor:
    """Place of activations on the histogram's axis, in bins from the lower edge of bin 0.

    The two end bins have no width of their own in octaves; on this axis each has a quarter. What is
    not a positive number has place 0, so that a place is always good to index with.
    """
    position = activation.log2().mul_(BINS_PER_OCTAVE).add_(1 - LOG2_MIN * BINS_PER_OCTAVE)
    return position.clamp_(0.0, NUM_BINS).nan_to_num_(0.0)


def edges() -> Tensor:
    """float64 [NUM_BINS + 2]: activations at positions 0, 1, ..., NUM_BINS + 1 of that axis."""
    position = torch.arange(NUM_BINS + 2, dtype=torch.float64)
    return torch.exp2((position - 1) / BINS_PER_OCTAVE + LOG2_MIN)
