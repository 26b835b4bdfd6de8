"""What the features that a ranking shows first are worth: the measures that pick the default.

Of ordinary tokens (no special ones, no sinks, each context once), the first k features of each
ranking are judged by

    label fit   How often the label of a shown feature names this token, or after its arrow the
                next one, less what the same labels would on any token of the corpus, as a share
                of what was left to gain: (hits - expected) / (shown - expected). 0 is chance, and
                a label that says “the” gains little. Lift is hits / expected.
    token,      Bits that the shown set tells of the token, or of the next one, beyond how frequent
    next token  each is: naive Bayes fitted on half of the documents, tempered on a quarter, judged
                on the last, in rotation. Less than 0: no better than knowing nothing.
    KL          Of the next-token distribution, in nats, when the shown features are taken out of
                the residual at that token, and the SAE's error is left in.
    kept        Share of the shown set that was shown at the token before too (Jaccard).
    distinct    How many different features were shown at all.
    explained   Variance of the residuals that is explained when the shown features are known, and
                all others are taken for their mean.

Beside the rankings stands `random`, k active features drawn evenly. Intervals are of 95 %, by
bootstrap over documents, the same draws for all, so that differences are of pairs.

The rule that picks the default was written before the first result was seen. At max_frequency 0.5
and k = 3, a ranking is eligible if what it shows matters to the model: its median KL exceeds that
of `random`, and the interval of the difference excludes 0. Of the eligible the best by label fit is
taken, with all whose difference from it has an interval that includes 0; of those, the highest
median KL. Nothing else counts: the other measures are there to see what that choice costs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.ranking import Ranker
from neuroscope_vllm.core.ranking_measures import (
    Bootstrap,
    LabelFit,
    Shown,
    Tokens,
    contribution,
    divergence,
    information,
    interval,
    kept,
    unexplained,
)
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sae.sparse import encode_sparse

RANDOM = "random"


def gather(
    sae: SAE,
    sequences: Iterable[Sequence[int]],
    residual_of: Callable[[Sequence[int]], Tensor],
    special_ids: Collection[int],
    sink_norm: float,
) -> Tokens:
    """The tokens of `sequences`, each a document, that are judged, and all that fires on them.

    Left out are special tokens, sinks, the first and the last of a sequence, and what stands in a
    context that an earlier sequence had, such as a chat template's system prompt.

    Args:
        residual_of: float32 [n, d_model] of a sequence of n tokens.

    Raises:
        ConfigError: None is left.
    """
    special, seen = frozenset(special_ids), set[int]()
    parts: list[tuple[Tensor, ...]] = []
    fired: list[tuple[Tensor, Tensor]] = []
    for document, ids in enumerate(sequences):
        residual = residual_of(ids)
        context, wanted = 0, torch.zeros(len(ids), dtype=torch.bool)
        for position, token_id in enumerate(ids):
            context = hash((context, token_id))
            wanted[position] = context not in seen and token_id not in special
            seen.add(context)
        wanted[:1] = wanted[-1:] = False
        wanted &= residual.norm(dim=1) <= sink_norm
        position = wanted.nonzero().squeeze(1)
        token_id = torch.tensor(list(ids))
        firings = encode_sparse(sae, residual[position])
        count = torch.bincount(firings.row, minlength=len(position)).tolist()
        columns = (firings.feature.split(count), firings.activation.split(count))
        fired += zip(*columns, strict=True)
        number = torch.full_like(position, document)
        next_id = token_id[position + 1]
        parts.append((number, position, token_id[position], next_id, residual[position]))
    if not fired:
        raise ConfigError("the corpus has no ordinary token to judge; give running text.")
    feature, activation = zip(*fired, strict=True)
    columns = map(torch.cat, zip(*parts, strict=True))
    document, position, token_id, next_id, residual = columns
    return Tokens(
        document,
        position,
        token_id,
        next_id,
        residual,
        pad_sequence(list(feature), batch_first=True, padding_value=-1),
        pad_sequence(list(activation), batch_first=True),
    )


def shown_by(ranker: Ranker, tokens: Tokens, k: int, *, at_random: bool = False) -> Shown:
    """What `ranker` shows first, or any k of what it does not mask."""
    score = ranker.score(tokens.feature.clamp(min=0), tokens.activation)
    if at_random:
        score = torch.rand(score.shape, generator=torch.Generator().manual_seed(0))
    hidden = (tokens.feature < 0) | ranker.mask[tokens.feature.clamp(min=0)]
    value, place = score.masked_fill(hidden, float("-inf")).topk(min(k, score.shape[1]))
    none = value == float("-inf")
    return Shown(
        tokens.feature.gather(1, place).masked_fill(none, -1),
        tokens.activation.gather(1, place).masked_fill(none, 0.0),
    )


class Judge:
    """Every measure but KL, which needs the model, of what is shown of the same tokens."""

    def __init__(
        self, tokens: Tokens, sae: SAE, calibration: Calibration, fit: LabelFit, boot: Bootstrap
    ) -> None:
        self._tokens, self._sae, self._calibration = tokens, sae, calibration
        self._fit, self._boot = fit, boot

    def of(self, shown: Shown) -> dict[str, Tensor]:
        """Figures by name, float64 [1 + DRAWS] each; `distinct` and `shown` float64 [1]."""
        tokens, boot, document = self._tokens, self._boot, self._tokens.document
        hits, expected, judged = self._fit.of(shown)
        overlap, follows = kept(shown, tokens)
        error, spread = unexplained(shown, tokens, self._sae, self._calibration)
        is_shown = shown.feature >= 0
        return {
            "label_fit": boot.ratio(document, hits - expected, judged - expected),
            "label_hits": boot.ratio(document, hits, judged),
            "label_lift": boot.ratio(document, hits, expected),
            "token_bits": boot.mean(document, information(shown, tokens, tokens.token_id)),
            "next_bits": boot.mean(document, information(shown, tokens, tokens.next_id)),
            "kept": boot.ratio(document, overlap, follows),
            "explained": 1.0 - boot.ratio(document, error, spread),
            "distinct": shown.feature[is_shown].unique().numel() * torch.ones(1).double(),
            "shown": is_shown.double().sum(1).mean()[None],
        }


def ablate(
    shown: Sequence[Shown],
    tokens: Tokens,
    row: int,
    sae: SAE,
    next_logits: Callable[[Tensor], Tensor],
) -> Tensor:
    """KL of one token, float64 [len(shown)]: of each what it shows, taken out.

    Args:
        next_logits: [v, vocabulary], the logits after this token of v edits float32 [v, d_model] of
            its residual.
    """
    # Rankings often agree: each set is run once.
    sets = {tuple(sorted(s.feature[row].tolist())): s for s in shown}
    of = tokens.residual[row : row + 1]
    edits = [-contribution(sae, s.feature[[row]], s.activation[[row]], of) for s in sets.values()]
    told = divergence(next_logits(torch.cat([torch.zeros_like(of), *edits])))
    found = dict(zip(sets, told.tolist(), strict=True))
    return torch.tensor(
        [found[tuple(sorted(s.feature[row].tolist()))] for s in shown], dtype=torch.float64
    )


def verdict(fit: Mapping[str, Tensor], kl: Mapping[str, Tensor]) -> str | None:
    """The ranking that the rule above picks; None if none is eligible.

    Args:
        fit: Label fit of each ranking, bootstrapped.
        kl: Median KL of each, and of RANDOM.
    """
    eligible = [name for name in fit if interval(kl[name] - kl[RANDOM])[1] > 0]
    if not eligible:
        return None
    best = max(eligible, key=lambda name: float(fit[name][0]))
    tied = [name for name in eligible if interval(fit[best] - fit[name])[1] <= 0]
    return max(tied, key=lambda name: float(kl[name][0]))
