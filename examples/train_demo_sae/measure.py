"""Calibrate a saved SAE's threshold and measure it on held-out residuals."""

from collections.abc import Iterator

import torch
from sae_lens import SAE

SINK_RATIO = 6.0  # times the median norm


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
def firings(sae: SAE, acts: torch.Tensor) -> torch.Tensor:
    """How many tokens of `acts` [n, d_model] each feature fires on, [d_sae]."""
    return torch.stack([(f > 0).sum(0) for _, f in _encoded(sae, acts)]).sum(0)


@torch.no_grad()
def metrics(sae: SAE, acts: torch.Tensor) -> dict[str, float]:
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


def _encoded(sae: SAE, acts: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for x in acts.split(4096):
        x = x.float()
        yield x, sae.encode(x)
