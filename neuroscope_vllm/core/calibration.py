"""What each feature does on ordinary text: how often it fires and how strongly.

Also how large residuals are, which tells attention sinks, and how well the SAE rebuilds them. Built
from shards of a corpus (`passes`), on the CPU; read by `ranking`, steering and the feature card.
Counts and maxima merge exactly. Sums are fp64: merged in another order, their last bits may differ
(1e-12 relative). Leave special tokens and attention sinks out of what `update` sees: one sink
outweighs a shard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from neuroscope_vllm.core.artefacts import write_whole
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae.sparse import Firings, Reconstruction

VERSION = 2
KEY = "neuroscope_calibration"

# Activations, log-spaced: bin 0 holds (0, 2^-4), bins 1 to 64 a quarter of an octave each up to
# 2^12, bin 65 the rest. Residual-stream SAEs fire between about 0.1 and a few hundred.
LOG2_MIN, LOG2_MAX, BINS_PER_OCTAVE = -4, 12, 4
NUM_BINS = (LOG2_MAX - LOG2_MIN) * BINS_PER_OCTAVE + 2

# Residual norms, 64 bins an octave from 2^-8 to 2^20: a median good to 1 %.
NORM_LOG2_MIN, NORM_LOG2_MAX, NORM_BINS_PER_OCTAVE = -8, 20, 64
NUM_NORM_BINS = (NORM_LOG2_MAX - NORM_LOG2_MIN) * NORM_BINS_PER_OCTAVE

# A residual this many times the median norm is an attention sink.
SINK_MULTIPLE = 6.0

# Features that fire on more of the tokens are called dense (arXiv 2506.15679).
DENSE_FREQUENCY = 0.1


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
        norm_histogram: int64 [NUM_NORM_BINS], residuals by norm, sinks among them.
        sinks: Attention sinks left out.
        reconstruction: How well the SAE rebuilt those tokens; None: not measured.
        sink_norm: Norm above which a residual was taken for a sink; infinity: none was.
        sae, sae_digest, sae_input, model, corpus: What it was measured with; the same in all that
            merge, as is sink_norm. `sae_digest` is `SAE.digest`, `sae_input` "raw" or "rms".
        created: ISO date.
    """

    tokens: int
    firings: Tensor
    total: Tensor
    total_square: Tensor
    maximum: Tensor
    histogram: Tensor
    norm_histogram: Tensor
    reconstruction: Reconstruction | None = None
    sinks: int = 0
    sink_norm: float = float("inf")
    sae: str = ""
    sae_digest: str = ""
    sae_input: str = "raw"
    model: str = ""
    corpus: str = ""
    created: str = ""

    @classmethod
    def empty(
        cls,
        width: int,
        *,
        d_model: int | None = None,
        sink_norm: float = float("inf"),
        sae: str = "",
        sae_digest: str = "",
        sae_input: str = "raw",
        model: str = "",
        corpus: str = "",
        created: str = "",
    ) -> Calibration:
        """Of no tokens; with `d_model` it measures the reconstruction too."""
        return cls(
            tokens=0,
            firings=torch.zeros(width, dtype=torch.int64),
            total=torch.zeros(width, dtype=torch.float64),
            total_square=torch.zeros(width, dtype=torch.float64),
            maximum=torch.zeros(width),
            histogram=torch.zeros(width, NUM_BINS, dtype=torch.int64),
            norm_histogram=torch.zeros(NUM_NORM_BINS, dtype=torch.int64),
            reconstruction=None if d_model is None else Reconstruction.empty(d_model),
            sink_norm=sink_norm,
            sae=sae,
            sae_digest=sae_digest,
            sae_input=sae_input,
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
    def dense(self) -> list[int]:
        """Features that fire on more than DENSE_FREQUENCY of the tokens, ascending."""
        return (self.frequency > DENSE_FREQUENCY).nonzero().squeeze(1).tolist()

    @property
    def l0(self) -> float:
        """Mean number of active features a token."""
        return float(self.firings.sum()) / max(self.tokens, 1)

    def update(self, num_tokens: int, firings: Firings) -> None:
        """Add tokens: how many there were, and what fired on them.

        Raises:
            ConfigError: A feature lies beyond the width.
        """
        feature, value = firings.feature.cpu(), firings.activation.cpu()
        if feature.numel() and int(feature.max()) >= self.width:
            raise ConfigError(
                f"activations of feature {int(feature.max())} were given to a calibration of"
                f" {self.width} features; use the SAE it was made for."
            )
        self.tokens += num_tokens
        self.firings += torch.bincount(feature, minlength=self.width)
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
            ConfigError: They were measured with another SAE, model, corpus or cut.
        """
        for name in ("width", "sink_norm", "sae", "sae_digest", "sae_input", "model", "corpus"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ConfigError(
                    f"calibrations of {name} {mine!r} and {name} {theirs!r} cannot be merged; "
                    f"calibrate both shards with the same SAE, model, corpus and sink cut."
                )
        rebuilt, theirs = self.reconstruction, other.reconstruction
        return replace(
            self,
            reconstruction=rebuilt.merge(theirs) if rebuilt and theirs else None,
            tokens=self.tokens + other.tokens,
            firings=self.firings + other.firings,
            total=self.total + other.total,
            total_square=self.total_square + other.total_square,
            maximum=torch.maximum(self.maximum, other.maximum),
            histogram=self.histogram + other.histogram,
            norm_histogram=self.norm_histogram + other.norm_histogram,
            sinks=self.sinks + other.sinks,
            created=max(self.created, other.created),
        )

    def to_bytes(self) -> bytes:
        """One safetensors file; counts, the cut and the provenance go to its metadata."""
        header = {name: getattr(self, name) for name in _HEADER} | {"version": VERSION}
        if self.reconstruction is not None:
            header["squared_error"] = self.reconstruction.squared_error
        # One entry: safetensors writes several in a different order each time.
        return save(self._tensors(), {KEY: json.dumps(header, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        """Write `to_bytes`; the file is replaced whole or not at all, also if the machine dies."""
        write_whole(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ConfigError: There is no such file, it is not a calibration, or its version is unknown.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"calibration {path} can not be read ({error.strerror}); make one with"
                " `neuroscope calibrate`."
            ) from error
        except ConfigError as error:
            raise ConfigError(
                f"calibration {path} can not be used: {error} Make it again with"
                " `neuroscope calibrate`, or delete it."
            ) from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Calibration:
        """Read what `to_bytes` wrote. Raises ConfigError if it is anything else."""
        try:
            tensors = load(data)
            metadata = _metadata(data)
        except (SafetensorError, ValueError) as error:
            raise ConfigError(f"it is not a safetensors file ({error}).") from error
        version = metadata.get("version")
        if version != VERSION:
            raise ConfigError(f"it is of version {version or 'none'}, not {VERSION}.")
        width = len(tensors["firings"]) if "firings" in tensors else 0
        rebuilt = "total_residual" in tensors
        d_model = len(tensors["total_residual"]) if rebuilt else 0
        like = cls.empty(width, d_model=d_model if rebuilt else None)._tensors()
        for name, expected in like.items():
            _check_tensor(name, tensors.get(name), expected)
        try:
            known = {name: type(like)(metadata[name]) for name, like in _HEADER.items()}
            read = replace(cls.empty(width), **known, **{name: tensors[name] for name in _TENSORS})
            if rebuilt:
                read.reconstruction = Reconstruction(
                    num_rows=read.tokens,
                    num_firings=int(read.firings.sum()),
                    squared_error=float(metadata["squared_error"]),
                    total=tensors["total_residual"],
                    total_square=tensors["total_square_residual"],
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"its header is not a calibration's ({error}).") from error
        return read

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        if self.reconstruction is not None:
            tensors["total_residual"] = self.reconstruction.total
            tensors["total_square_residual"] = self.reconstruction.total_square
        return tensors


_TENSORS = ("firings", "total", "total_square", "maximum", "histogram", "norm_histogram")
_HEADER: dict[str, int | float | str] = {"tokens": 0, "sinks": 0, "sink_norm": 0.0} | dict.fromkeys(
    ("sae", "sae_digest", "sae_input", "model", "corpus", "created"), ""
)


def _metadata(data: bytes) -> dict[str, Any]:
    """Our part of a safetensors header, which its own `load` leaves out."""
    size = int.from_bytes(data[:8], "little")
    texts = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    found = json.loads(texts.get(KEY, "{}"))
    return found if isinstance(found, dict) else {}


def _check_tensor(name: str, tensor: Tensor | None, like: Tensor) -> None:
    if tensor is None:
        raise ConfigError(f"it has no tensor {name!r}.")
    if tensor.dtype != like.dtype or tensor.shape != like.shape:
        raise ConfigError(
            f"its {name} is {tensor.dtype} {list(tensor.shape)}, not {like.dtype}"
            f" {list(like.shape)}."
        )
    if not bool(tensor.isfinite().all()):
        raise ConfigError(f"its {name} holds a value that is not finite.")
    if name != "total_residual" and bool((tensor < 0).any()):
        raise ConfigError(f"its {name} holds a negative value.")


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
