"""Two SAEs of one model, and what the decoder of the earlier writes for the encoder of the later.

A feature i of the earlier layer that is active at a_i adds a_i * W_dec[i] to the residual stream,
and feature j of the later layer reads it by W_enc[:, j]. So what i does to j's pre-activation,
straight through the residual stream, is a_i times the virtual weight

    V_ij = <W_dec of the earlier [i], W_enc of the later [:, j]>

(Ameisen et al., "Circuit Tracing: Revealing Computational Graphs in Language Models", 2025). What
attention and MLPs between the layers make of it is not in V. Most pairs never fire on the same
token, and their weights mean nothing ("interference weights"). Over tokens that both are seen on,
the same work weights V by how often they are:

    ERA_ij   = E[1(a_j > 0) a_i] V_ij       expected residual attribution
    TWERA_ij = E[a_i a_j] / E[a_j] V_ij     target-weighted expected residual attribution

ERA_ij is what i adds to j's activation, a token, where j is active; TWERA_ij the same on a token
drawn in proportion to a_j, which does not fade for rare j. Both know only what fires together, so
an i that keeps j silent has neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.causal.firings import JointFirings
from neuroscope_vllm.core.errors import ConfigError, SAEError
from neuroscope_vllm.core.sae.info import RESID_POST, SAEInfo
from neuroscope_vllm.core.sae.sae import SAE

MAX_BYTES = 256 << 20
CELL_BYTES = 64  # of one pair: two weights, two sums in float64, and what ranks them


@dataclass(frozen=True, eq=False)
class Pair:
    """Two SAEs that `check_pair` let pass, of `lower_layer` < `upper_layer`."""

    lower: SAE
    upper: SAE
    lower_layer: int
    upper_layer: int


class Block(NamedTuple):
    """r features of the earlier layer by c of the later.

    Attributes:
        rows: int64 [r], features of the earlier layer.
        columns: int64 [c], of the later.
        weight: float32 [r, c], V.
        cosine: float32 [r, c], of the two decoder directions: near 1 where the later feature means
            the same as the earlier one, whose content the residual stream merely keeps.
        era, twera: float32 [r, c]; None without firings. Zero where the two never fire together.
        together: int32 [r, c], tokens on which both fire.
    """

    rows: Tensor
    columns: Tensor
    weight: Tensor
    cosine: Tensor
    era: Tensor | None
    twera: Tensor | None
    together: Tensor | None


def check_pair(infos: Mapping[int, SAEInfo], sae_input: str = "raw") -> tuple[int, int]:
    """(the earlier layer, the later one) of SAEs by layer.

    Raises:
        ConfigError: They are not two.
        SAEError: They are of different sizes, or one is of another layer, or no autoencoder of raw
            residuals.
    """
    if len(infos) != 2:
        raise ConfigError(
            f"{len(infos)} SAEs are given, but influence is traced from one layer to a later one;"
            " give --sae twice."
        )
    lower, upper = sorted(infos)
    for layer, info in infos.items():
        if info.layer not in (None, layer):
            raise SAEError(
                f"SAE {info.source} was trained on layer {info.layer} and cannot read layer"
                f" {layer}; leave --layer out."
            )
        if info.output_point is not None or info.hook_point != RESID_POST:
            predicts = f" and predicts {info.output_point}" if info.output_point else ""
            raise SAEError(
                f"SAE {info.source} reads {info.hook_point}{predicts}, but virtual weights are"
                f" traced through the residual stream; choose an autoencoder of {RESID_POST}."
            )
        if info.input_norm is not None or sae_input != "raw":
            raise SAEError(
                f"SAE {info.source} reads each row divided by the row's own size"
                f" ({info.input_norm or sae_input}), so the weight between two features is another"
                " on each token; choose SAEs that read residuals as they are."
            )
    one, other = infos[lower], infos[upper]
    if one.d_model != other.d_model:
        raise SAEError(
            f"SAE {one.source} reads residuals of size {one.d_model} and SAE {other.source} of"
            f" {other.d_model}; choose two of the same model."
        )
    return lower, upper


def blocks(
    pair: Pair,
    firings: JointFirings | None = None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Block]:
    """All pairs of features, some of the later layer's features at a time.

    Args:
        firings: Of these two SAEs, for ERA and TWERA.
        rows, columns: int64, features of the earlier and the later layer; None: all.
        max_bytes: What one block and what ranks it may take; one column is always taken.
    """
    rows = torch.arange(pair.lower.width) if rows is None else rows
    columns = torch.arange(pair.upper.width) if columns is None else columns
    whole = len(rows) == pair.lower.width
    written = pair.lower.W_dec.float()
    written = written if whole else written[rows]
    norm = torch.linalg.vector_norm(written, dim=1)[:, None].clamp_(min=1e-30)
    chosen = firings.of_rows(rows) if firings is not None else None
    for some in columns.split(max(1, max_bytes // (CELL_BYTES * max(len(rows), 1)))):
        weight = written @ pair.upper.W_enc[:, some].float()
        direction = torch.nn.functional.normalize(pair.upper.W_dec[some].float(), dim=1)
        cosine = (written @ direction.t()).div_(norm)
        if chosen is None:
            yield Block(rows, some, weight, cosine, None, None, None)
            continue
        sums = chosen.sums(some)
        mean = chosen.upper_mean[some]
        era = (sums.masked / max(chosen.tokens, 1)).float().mul_(weight)
        sums.product.div_(max(chosen.tokens, 1)).div_(torch.where(mean > 0, mean, 1.0))
        yield Block(rows, some, weight, cosine, era, sums.product.float().mul_(weight),
                    sums.together)  # fmt: skip
