"""Corpus passes: what is gathered from the residuals of many sequences.

An engine runs the sequences. A gatherer sits where their rows are, which may be a worker process
of vLLM, and sees each row once; what it gathered travels back as bytes. So a pass is a plain
record that can be sent, makes its gatherer there (`gather`) and reads its result here (`read`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import torch
from safetensors.torch import load, save
from torch import Tensor

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sae.sparse import Firings, decode_sparse, encode_sparse

if TYPE_CHECKING:
    from neuroscope_vllm.core.examples.gather import Gathered


class Rows(NamedTuple):
    """Rows of one layer, of one or more sequences, in any order.

    Attributes:
        sequence: int64 [n], number of the sequence in the run, from 0, on the CPU.
        position: int64 [n], likewise.
        token_id: int64 [n], likewise.
        residual: [n, d_model], any float dtype, on the engine's device.
    """

    sequence: Tensor
    position: Tensor
    token_id: Tensor
    residual: Tensor


class Gatherer(Protocol):
    """What sees the rows of one layer."""

    def add(self, rows: Rows) -> None: ...

    def result(self) -> bytes: ...


class CalibrationPass(msgspec.Struct, frozen=True, kw_only=True, tag="calibration"):
    """Statistics of every feature; see `calibration`.

    Attributes:
        special_ids: Tokens left out of everything, norms too.
        sink_norm: Rows above this norm are left out of all but the norms.
        sae, sae_input, model, corpus, created: The calibration's provenance; `sae` by layer.
    """

    special_ids: list[int]
    sink_norm: dict[int, float] = {}
    sae: dict[int, str] = {}
    sae_input: str = "raw"
    model: str = ""
    corpus: str = ""
    created: str = ""

    def gather(self, layer: int, sae: SAE) -> Gatherer:
        return _Calibrating(self, layer, sae)

    @staticmethod
    def read(result: bytes) -> Calibration:
        return Calibration.from_bytes(result)


class _Calibrating:
    def __init__(self, what: CalibrationPass, layer: int, sae: SAE) -> None:
        self._sae = sae
        self._special = torch.tensor(what.special_ids, dtype=torch.int64)
        self._calibration = Calibration.empty(
            sae.width,
            d_model=sae.d_model,
            sink_norm=what.sink_norm.get(layer, float("inf")),
            sae=what.sae.get(layer, ""),
            sae_digest=sae.digest,
            sae_input=what.sae_input,
            model=what.model,
            corpus=what.corpus,
            created=what.created,
        )

    def add(self, rows: Rows) -> None:
        calibration = self._calibration
        ordinary = ~torch.isin(rows.token_id, self._special)
        residual = rows.residual[ordinary.to(rows.residual.device)].float()
        norms = torch.linalg.vector_norm(residual, dim=1).cpu()
        calibration.update_norms(norms)
        kept = norms <= calibration.sink_norm
        calibration.sinks += int((~kept).sum())
        residual = residual[kept.to(residual.device)]
        firings = encode_sparse(self._sae, residual)
        calibration.update(len(residual), firings)
        assert calibration.reconstruction is not None
        decoded = decode_sparse(self._sae, firings, len(residual), of=residual)
        calibration.reconstruction.add(residual, decoded, firings.row.numel())

    def result(self) -> bytes:
        return self._calibration.to_bytes()


class FeaturePass(msgspec.Struct, frozen=True, tag="features"):
    """All features of every token: for short texts, a few kilobytes a token."""

    def gather(self, layer: int, sae: SAE) -> Gatherer:
        return _Listing(sae)

    @staticmethod
    def read(result: bytes) -> TokenFeatures:
        return TokenFeatures(**load(result))


class TokenFeatures(NamedTuple):
    """Features of the tokens of all sequences, by sequence, then position.

    Attributes:
        sequence, position, token_id: int64 [n].
        norm: float32 [n], of the residual.
        start: int64 [n + 1], where each token's features begin in the two below.
        feature: int64 [m], ascending within a token.
        activation: float32 [m].
    """

    sequence: Tensor
    position: Tensor
    token_id: Tensor
    norm: Tensor
    start: Tensor
    feature: Tensor
    activation: Tensor


class _Listing:
    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, rows: Rows) -> None:
        residual = rows.residual.float()
        norm = torch.linalg.vector_norm(residual, dim=1).cpu()
        firings = Firings(*(column.cpu() for column in encode_sparse(self._sae, residual)))
        count = torch.bincount(firings.row, minlength=len(norm))
        self._parts.append((*rows[:3], norm, count, firings.feature, firings.activation))

    def result(self) -> bytes:
        columns = zip(*self._parts, strict=True)
        sequence, position, token_id, norm, count, feature, activation = map(torch.cat, columns)
        place = sequence * (int(position.max()) + 1) + position
        order = place.argsort()
        row = place.argsort().argsort().repeat_interleave(count)  # of each firing, once in order
        firing = row.sort(stable=True).indices
        start = torch.nn.functional.pad(count[order].cumsum(0), (1, 0))
        tokens = (sequence[order], position[order], token_id[order], norm[order])
        listed = TokenFeatures(*tokens, start, feature[firing], activation[firing])
        return save(listed._asdict())


class Floors(msgspec.Struct, frozen=True, kw_only=True):
    """What need not be sent, since as good is there already.

    Attributes:
        activation: float32 [width], as bytes; weaker tokens are none of a feature's strongest.
        ident: uint64 [width], likewise; tokens with a larger ident are not in its sample.
        context: Those with a larger ident are not kept.
    """

    activation: bytes
    ident: bytes
    context: int


class ExamplesPass(msgspec.Struct, frozen=True, kw_only=True, tag="examples"):
    """Examples of every feature; see `examples.gather`.

    Attributes:
        special_ids: Tokens left out of everything but contexts.
        sink_norm: Rows above this norm are, likewise.
        before, after: Tokens of context on either side of an example's own.
        top, sample: Strongest tokens, and uniformly sampled ones, of a feature.
        floors: By layer. They save work and change nothing in what is kept in the end, so they may
            be out of date.
    """

    special_ids: list[int]
    sink_norm: dict[int, float]
    before: int
    after: int
    top: int
    sample: int
    floors: dict[int, Floors] = {}

    def gather(self, layer: int, sae: SAE) -> Gatherer:
        from neuroscope_vllm.core.examples.gather import GatheringExamples

        return GatheringExamples(self, layer, sae)

    @staticmethod
    def read(result: bytes) -> Gathered:
        from neuroscope_vllm.core.examples.gather import Gathered

        return Gathered.from_bytes(result)


Pass = CalibrationPass | FeaturePass | ExamplesPass
