"""Calibrate a saved SAE's threshold, and measure it and its controls on held-out residuals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from sae_lens import SAE
from torch.nn.functional import cross_entropy

from neuroscope_vllm.engine.hf.hooks import at_layer

SINK_RATIO = 6.0  # times the median norm


class Autoencoder(Protocol):
    """An SAE of SAELens, or a control."""

    def encode(self, x: torch.Tensor) -> torch.Tensor: ...
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor: ...


def sink_cut(acts: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """(median, cut) of the residual norms of the masked-in tokens of [n_seq, seq_len, d_model]."""
    median = float(_norms(acts)[mask].median())
    return median, SINK_RATIO * median


def without_sinks(acts: torch.Tensor, mask: torch.Tensor, cut: float) -> torch.Tensor:
    """`mask`, False as well where a residual's norm is above the cut."""
    return mask & (_norms(acts) <= cut)


def _norms(acts: torch.Tensor) -> torch.Tensor:
    """Float32 norms [n_seq, seq_len], a few rows at a time to spare memory."""
    return torch.cat([rows.float().norm(dim=-1) for rows in acts.split(16)])


def calibrate_threshold(sae: SAE, acts: torch.Tensor, l0: float) -> float:
    """Set the one threshold that gives a mean of `l0` features a token on `acts` [n, d_model]."""
    pre = torch.cat([sae.encode(x.float()) for x in acts.split(4096)]).flatten()
    threshold = float(pre.kthvalue(pre.numel() - round(l0 * len(acts))).values)
    sae.threshold.data.fill_(threshold)
    return threshold


@torch.no_grad()
def firings(sae: Autoencoder, acts: torch.Tensor) -> torch.Tensor:
    """How many tokens of `acts` [n, d_model] each feature fires on, [d_sae]."""
    return torch.stack([(f > 0).sum(0) for _, f in _encoded(sae, acts)]).sum(0)


@torch.no_grad()
def metrics(sae: Autoencoder, acts: torch.Tensor) -> dict[str, float]:
    """How well residuals [n, d_model] are rebuilt.

    `fvu` is the squared error over the variance around the mean residual of `acts`.
    """
    mean = acts.float().mean(0)
    error = variance = cosine = l0 = 0.0
    for x, f in _encoded(sae, acts):
        rebuilt = sae.decode(f)
        error += float((rebuilt - x).square().sum())
        variance += float((x - mean).square().sum())
        cosine += float(torch.cosine_similarity(rebuilt, x).sum())
        l0 += float((f > 0).sum())
    n = len(acts)
    return {
        "tokens": n,
        "explained_variance": round(1 - error / variance, 4),
        "fvu": round(error / variance, 4),
        "cosine": round(cosine / n, 4),
        "l0": round(l0 / n, 1),
    }


@torch.no_grad()
def rounding(exact: Autoencoder, stored: Autoencoder, acts: torch.Tensor) -> dict[str, float]:
    """What storing the weights in fewer bits does to residuals [n, d_model]."""
    before = torch.cat([f for _, f in _encoded(exact, acts)])
    after = torch.cat([f for _, f in _encoded(stored, acts)])
    both = (before > 0) & (after > 0)
    changed = (before > 0) ^ (after > 0)
    return {
        "tokens": len(acts),
        "explained_variance": metrics(exact, acts)["explained_variance"],
        "explained_variance_stored": metrics(stored, acts)["explained_variance"],
        "firings_changed": float(changed.sum() / (before > 0).sum()),
        "activation_change_median": float((after[both] / before[both] - 1).abs().median()),
    }


def _encoded(sae: Autoencoder, acts: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for x in acts.split(4096):
        x = x.float()
        yield x, sae.encode(x)


@dataclass
class Dictionary:
    """A control: directions that were not learned as an SAE's are, the `k` best of each token."""

    directions: torch.Tensor  # [n, d_model], unit norm
    mean: torch.Tensor  # [d_model]
    k: int
    gain: float = 1.0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        found = ((x - self.mean) @ self.directions.T).relu()
        best = found.topk(self.k, dim=-1)
        return torch.zeros_like(found).scatter_(-1, best.indices, best.values)

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return self.gain * (feature_acts @ self.directions) + self.mean

    @staticmethod
    def of_principal_components(x: torch.Tensor, k: int) -> "Dictionary":
        """All principal components of `x` [n, d_model], each in both directions."""
        mean = x.mean(0)
        components = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.T
        return Dictionary(torch.cat([components, -components]), mean, k)

    @staticmethod
    def of_random_directions(x: torch.Tensor, n: int, k: int) -> "Dictionary":
        """`n` random ones, with the scale that rebuilds `x` best."""
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(n, x.shape[1], generator=generator)
        made = Dictionary(directions / directions.norm(dim=-1, keepdim=True), x.mean(0), k)
        some = x[:4096]
        rebuilt = made.encode(some) @ made.directions
        made.gain = float((rebuilt * (some - made.mean)).sum() / rebuilt.square().sum())
        return made


class Losses:
    """What the model loses when the residual of a layer is rebuilt: cross entropy a token, of the
    tokens after those that are replaced. Special tokens and attention sinks stay as they are.

    Attributes:
        clean, zeroed: Loss as it is, and with zeros in their place.
    """

    def __init__(
        self, model: torch.nn.Module, layer: int, tokens: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """`tokens` [n_seq, seq_len] and which of them are replaced, [n_seq, seq_len] bool."""
        self._model, self._layer = model, model.model.layers[layer]
        self._tokens, self._mask = tokens, mask
        self.clean = self._loss(lambda x: x)
        self.zeroed = self._loss(torch.zeros_like)

    def recovered(self, sae: Autoencoder) -> float:
        """1: as good as the model; 0: as bad as with zeros."""
        spliced = self._loss(lambda x: sae.decode(sae.encode(x)))
        return round((self.zeroed - spliced) / (self.zeroed - self.clean), 4)

    def _loss(self, rebuild: Callable[[torch.Tensor], torch.Tensor]) -> float:
        total = count = 0.0
        for tokens, mask in zip(self._tokens.split(8), self._mask.split(8), strict=True):

            def replace(hidden: torch.Tensor, mask: torch.Tensor = mask) -> torch.Tensor:
                new = hidden.clone()
                new[mask] = rebuild(hidden[mask])
                return new

            with at_layer(self._layer, replace):
                logits = self._model(tokens, use_cache=False).logits
            judged = mask[:, :-1]
            found = cross_entropy(logits[:, :-1][judged], tokens[:, 1:][judged], reduction="sum")
            total, count = total + float(found), count + int(judged.sum())
        return total / count
