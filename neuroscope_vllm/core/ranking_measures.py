"""The measures behind `ranking_quality`, which says what they mean, over many tokens at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.token_labels import readable

DRAWS = 1000
# How `compose_label` says what tokens have in common.
_DIGITS = ("years: “", "numbers: “")
_KIND = re.compile(r"^(?:\w+-|-\w+): (?=“)")
_ELLIPSIS = re.compile(r"^…(?=\w)|(?<=\w)…$")
_NEIGHBOUR = re.compile("” (?:after|before|in|near) “")

FOLDS = 4
TEMPERATURES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
PRIOR_TOKENS = 2.0  # imagined tokens of each feature, distributed as all are
MIN_COUNT = 5  # rarer tokens are one class
CHUNK_ROWS = 1024


class Tokens(NamedTuple):
    """Tokens that are judged, document by document, and all that fired on them.

    Attributes:
        document: int64 [n], from 0.
        position: int64 [n], in the document.
        token_id, next_id: int64 [n].
        residual: float32 [n, d_model].
        feature: int64 [n, m]; -1 where fewer than m fired.
        activation: float32 [n, m]; 0 there.
    """

    document: Tensor
    position: Tensor
    token_id: Tensor
    next_id: Tensor
    residual: Tensor
    feature: Tensor
    activation: Tensor


class Shown(NamedTuple):
    """The first k features of each token: index int64 [n, k], -1 where there are fewer, and
    activation float32 [n, k]."""

    feature: Tensor
    activation: Tensor


class Bootstrap:
    """Figures over resampled documents: float64 [1 + DRAWS], first of all documents as they are."""

    def __init__(self, documents: int) -> None:
        draw = torch.randint(
            documents, (DRAWS, documents), generator=torch.Generator().manual_seed(0)
        )
        times = torch.zeros(DRAWS, documents, dtype=torch.float64)
        times.scatter_add_(1, draw, torch.ones_like(draw, dtype=torch.float64))
        self._times = torch.cat([torch.ones_like(times[:1]), times])

    def ratio(self, document: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Of sums over rows [n] of these documents."""
        sums = torch.zeros(self._times.shape[1], 2, dtype=torch.float64)
        sums.index_add_(0, document, torch.stack([numerator, denominator], dim=1).double())
        above, below = (self._times @ sums).unbind(1)
        return above / below

    def mean(self, document: Tensor, value: Tensor) -> Tensor:
        return self.ratio(document, value, torch.ones_like(value))

    def median(self, document: Tensor, value: Tensor) -> Tensor:
        order = value.argsort()
        below = self._times[:, document[order]].cumsum(1)
        middle = (below < below[:, -1:] / 2).sum(1)
        return value.double()[order[middle.clamp(max=len(order) - 1)]]


def interval(figure: Tensor) -> tuple[float, float, float]:
    """(value, low, high) of a bootstrapped figure [1 + DRAWS], or of one that was not, [1]."""
    drawn = figure[1:] if len(figure) > 1 else figure
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=figure.dtype))
    return float(figure[0]), float(low), float(high)


class LabelFit:
    """Which tokens the labels of the `tokens` labeller name."""

    def __init__(
        self, labels: Mapping[int, str], tokens: Tokens, decode: Callable[[int], str], width: int
    ) -> None:
        """
        Args:
            labels: By feature.
            decode: The text of a token id.
        """
        ids = torch.cat([tokens.token_id, tokens.next_id]).unique().tolist()
        word_of = {token_id: readable(decode(token_id)).casefold() for token_id in ids}
        number = {word: at for at, word in enumerate(sorted(set(word_of.values())))}
        self._word, self._next = (
            torch.tensor([number[word_of[token_id]] for token_id in column.tolist()])
            for column in (tokens.token_id, tokens.next_id)
        )
        self._reads, self._writes = torch.zeros(2, width, len(number), dtype=torch.bool)
        self.judged = torch.zeros(width, dtype=torch.bool)
        for feature, text in labels.items():
            reads, writes = parse_label(text)
            self.judged[feature] = bool(reads or writes)
            for table, words in ((self._reads, reads), (self._writes, writes)):
                table[feature, [number[w] for w in words if w and w in number]] = True
        # Of each label, on how many of all tokens it would be right.
        self._expected = torch.zeros(width, dtype=torch.float64)
        for feature in self.judged.nonzero().squeeze(1).tolist():
            named = self._reads[feature, self._word] | self._writes[feature, self._next]
            self._expected[feature] = named.double().mean()

    def of(self, shown: Shown) -> tuple[Tensor, Tensor, Tensor]:
        """(hits, expected hits, labels judged), float64 [n] each."""
        feature = shown.feature.clamp(min=0)
        judged = (shown.feature >= 0) & self.judged[feature]
        hit = self._reads[feature, self._word[:, None]]
        hit |= self._writes[feature, self._next[:, None]]
        expected = self._expected[feature].masked_fill(~judged, 0.0)
        return (hit & judged).sum(1).double(), expected.sum(1), judged.sum(1).double()


def parse_label(text: str) -> tuple[set[str], set[str]]:
    """The tokens, as `readable` and in lower case, that a label reads and writes; empty sets if it
    is not of the `tokens` labeller, or names numbers, of which tokens are digits."""
    if text.startswith(_DIGITS):
        return set(), set()
    reads, _, writes = text.partition("→ ") if text.startswith("→") else text.partition("” → ")
    reads = _NEIGHBOUR.split(_KIND.sub("", reads.removesuffix("”")))[0]
    return {_ELLIPSIS.sub("", word) for word in _quoted(f"{reads}”")}, _quoted(writes)


def _quoted(listed: str) -> set[str]:
    if not (listed.startswith("“") and listed.endswith("”")):
        return set()
    return {word.casefold() for word in listed[1:-1].split("”, “") if word}


def information(shown: Shown, tokens: Tokens, target_id: Tensor) -> Tensor:
    """Bits that each token's shown set tells of its target beyond the target's own frequency.

    Args:
        target_id: int64 [n]; ids seen fewer than MIN_COUNT times are taken for one.

    Returns:
        float64 [n], each from a model that did not see the token's document.
    """
    _, target, count = target_id.unique(return_inverse=True, return_counts=True)
    common = torch.where(count >= MIN_COUNT, torch.arange(len(count)), -1)
    _, target = common[target].unique(return_inverse=True)
    documents = int(tokens.document.max()) + 1
    shuffled = torch.randperm(documents, generator=torch.Generator().manual_seed(0))
    fold = (shuffled % FOLDS)[tokens.document]
    # Column 0 stands for no feature.
    columns = shown.feature.new_tensor([-1])
    used, column = torch.cat([columns, shown.feature.reshape(-1)]).unique(return_inverse=True)
    column = column[1:].view_as(shown.feature)
    bits = torch.zeros(len(target), dtype=torch.float64)
    for test in range(FOLDS):
        tune = (test + 1) % FOLDS
        model = _NaiveBayes(column, target, (fold != test) & (fold != tune), len(used))
        told = model.log_likelihoods(fold == tune).mean(0)
        found = model.log_likelihoods(fold == test, [TEMPERATURES[int(told.argmax())], 0.0])
        bits[fold == test] = (found[:, 0] - found[:, 1]) / torch.tensor(2.0).log()
    return bits


class _NaiveBayes:
    """Classes from sets of features; at temperature 0 the classes' own frequencies."""

    def __init__(self, column: Tensor, target: Tensor, fit: Tensor, features: int) -> None:
        classes = int(target.max()) + 1
        self._column, self._target = column, target
        prior = torch.bincount(target[fit], minlength=classes) + 0.5
        self._prior = prior / prior.sum()
        cell = column[fit] * classes + target[fit, None]
        count = torch.bincount(cell.view(-1), minlength=features * classes).view(features, classes)
        smooth = (count + PRIOR_TOKENS * self._prior) / (count.sum(1, True) + PRIOR_TOKENS)
        self._evidence = (smooth / self._prior).log()
        self._evidence[0] = 0.0

    def log_likelihoods(self, rows: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> Tensor:
        """float64 [rows, temperatures], in nats."""
        found = []
        for part in rows.nonzero().squeeze(1).split(CHUNK_ROWS):
            evidence = embedding_bag(self._column[part], self._evidence, mode="sum")
            target = self._target[part, None]
            told = [
                (self._prior.log() + t * evidence).log_softmax(1).gather(1, target)
                for t in temperatures
            ]
            found.append(torch.cat(told, dim=1).double())
        return torch.cat(found)


def kept(shown: Shown, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(Jaccard overlap with the set of the token before, whether there is one), float64 [n]."""
    before = shown.feature.roll(1, 0)
    same = (shown.feature[:, :, None] == before[:, None, :]) & (shown.feature[:, :, None] >= 0)
    both = same.sum((1, 2)).double()
    either = (shown.feature >= 0).sum(1) + (before >= 0).sum(1) - both
    follows = tokens.document == tokens.document.roll(1)
    follows &= tokens.position == tokens.position.roll(1) + 1
    follows &= either > 0
    return torch.where(follows, both / either.clamp(min=1), 0.0), follows.double()


def unexplained(
    shown: Shown, tokens: Tokens, sae: SAE, calibration: Calibration
) -> tuple[Tensor, Tensor]:
    """(squared error, squared distance from the mean residual), float64 [n]."""
    deviation = shown.activation - calibration.mean.float()[shown.feature.clamp(min=0)]
    deviation = deviation.masked_fill(shown.feature < 0, 0.0)
    distance = tokens.residual - tokens.residual.mean(0)
    error = distance - contribution(sae, shown.feature, deviation, tokens.residual)
    return error.double().square().sum(1), distance.double().square().sum(1)


def contribution(sae: SAE, feature: Tensor, activation: Tensor, of: Tensor) -> Tensor:
    """What features int64 [n, k] (-1: none) of activations float32 [n, k] add to the residuals
    `of`, float32 [n, d_model]."""
    x = embedding_bag(
        feature.clamp(min=0), sae.W_dec.float(), mode="sum", per_sample_weights=activation
    )
    return sae.restored(x, of) - sae.restored(torch.zeros_like(x), of)


def divergence(logits: Tensor) -> Tensor:
    """KL(first || other), nats, float64 [v]: of rows [1 + v, vocabulary] all but the first."""
    told = logits.double().log_softmax(1)
    return (told[0].exp() * (told[0] - told[1:])).sum(1)
