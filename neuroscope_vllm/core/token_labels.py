"""Labels without a language model: what a feature reads, and what it writes.

The `tokens` labeller. A label joins the tokens on which the feature fires most strongly and
those that its decoder direction promotes, as in

    “Paris”, “Rome”, “city” → “of”, “,”

`label_by_tokens` takes the first from what `collect` gathered; `TopExamples` gathers them from any
stream of activations, on the CPU. The second come from the weights.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.autointerp.explain import choose_examples
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.examples import ExampleStore
from neuroscope_vllm.core.examples.records import TOP
from neuroscope_vllm.core.labels import Label
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.unembedding import read_unembedding

LABELLER = "tokens"
METHOD = "top tokens and promoted tokens"
READ_METHOD = "top tokens"

READ_TOKENS, WRITTEN_TOKENS = 3, 2
_SPECIAL = re.compile(r"<unused\d+>|<\|.*\|>|<0x[0-9A-F]{2}>|</?s>|<(pad|bos|eos|unk|mask)>")
# A token is promoted when its logit stands this many sigmas above what the largest of as many
# random logits would reach, sqrt(2 ln vocabulary).
PROMOTED_MARGIN = 0.5
LOGIT_ROWS = 64  # features at a time: 64 MiB of logits at Gemma's vocabulary


class Example(NamedTuple):
    """One of a feature's strongest activations."""

    activation: float
    token_id: int
    position: int


class TopExamples:
    """The m strongest activations of every feature in a stream of tokens."""

    def __init__(self, width: int, m: int = 20) -> None:
        self.activation = torch.zeros(width, m)  # [width, m], descending; 0 = no example
        self.token_id = torch.full((width, m), -1, dtype=torch.int64)
        self.position = torch.full((width, m), -1, dtype=torch.int64)

    def update(self, activations: Tensor, token_ids: Tensor, positions: Tensor) -> None:
        """Add a batch of tokens.

        Args:
            activations: [n, width], never negative.
            token_ids: int64 [n].
            positions: int64 [n], whatever finds the token again: its place in the corpus.
        """
        width, m = self.activation.shape
        flat = activations.reshape(-1)
        where = (flat > 0).nonzero().squeeze(1)
        value = flat[where].float().cpu()
        where = where.cpu()
        feature = where % width
        # Few of a long stream's activations beat what is kept.
        better = (value > self.activation[feature, -1]).nonzero().squeeze(1)
        value, feature = value[better], feature[better]
        row = where[better] // width
        value, order = value.sort(descending=True, stable=True)
        feature, regroup = feature[order].sort(stable=True)
        value, row = value[regroup], row[order[regroup]]
        rank = torch.arange(feature.numel()) - torch.searchsorted(feature, feature)
        kept = rank < m
        row = row[kept]
        self._merge(
            feature[kept], rank[kept], value[kept], token_ids.cpu()[row], positions.cpu()[row]
        )

    def _merge(
        self, feature: Tensor, rank: Tensor, value: Tensor, token_id: Tensor, position: Tensor
    ) -> None:
        touched, slot = feature.unique(return_inverse=True)
        m = self.activation.shape[1]
        place = slot * (2 * m) + m + rank
        merged = {}
        for name, new in (("activation", value), ("token_id", token_id), ("position", position)):
            old = getattr(self, name)[touched]
            both = torch.cat([old, torch.zeros_like(old)], dim=1)
            both.view(-1)[place] = new.to(both.dtype)
            merged[name] = both
        # Stable: of equal activations the earlier is kept.
        order = merged["activation"].sort(dim=1, descending=True, stable=True).indices[:, :m]
        for name, both in merged.items():
            getattr(self, name)[touched] = both.gather(1, order)

    def of(self, index: int) -> list[Example]:
        """A feature's examples, strongest first."""
        columns = (self.activation[index], self.token_id[index], self.position[index])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Example(*row) for row in rows if row[0] > 0]


def promoted_tokens(directions: Tensor, unembedding: Tensor, k: int = 10) -> list[list[int]]:
    """Tokens that each decoder direction makes likelier, strongest first; [] if none stands out.

    Args:
        directions: [features, d_model], rows of `W_dec * final_norm_gain`. The norm also divides by
            a number of the token's own, which cannot change the order.
        unembedding: [vocabulary, d_model], W_U by token.
        k: At most so many a feature.
    """
    vocabulary = unembedding.shape[0]
    floor = math.sqrt(2.0 * math.log(vocabulary)) + PROMOTED_MARGIN
    promoted = []
    for block in directions.to(unembedding.dtype).split(LOGIT_ROWS):
        logits = (block @ unembedding.t()).float()
        value, token_id = logits.topk(min(k, vocabulary), dim=1)
        spread, mean = torch.std_mean(logits, dim=1, keepdim=True)
        stands_out = (value - mean) > floor * spread
        rows = zip(token_id.tolist(), stands_out.sum(dim=1).tolist(), strict=True)
        promoted += [ids[:count] for ids, count in rows]
    return promoted


def compose_label(top: Iterable[tuple[str, float]], promoted: Iterable[str] = ()) -> str:
    """A label from a feature's tokens.

    Args:
        top: (token, activation) of its strongest examples; a token that recurs weighs more.
        promoted: Tokens its direction promotes, strongest first (`promoted_tokens`).

    Returns:
        The label, without an arrow when nothing readable is promoted; empty when nothing is left.
    """
    weight: dict[str, float] = {}
    spelling: dict[str, str] = {}
    for token, activation in top:
        if text := readable(token):
            key = text.casefold()
            spelling.setdefault(key, text)
            weight[key] = weight.get(key, 0.0) + activation
    heaviest = sorted(weight, key=lambda key: -weight[key])[:READ_TOKENS]
    reads = ", ".join(f"“{spelling[key]}”" for key in heaviest)
    written: dict[str, str] = {}
    for token in promoted:
        if text := readable(token):
            written.setdefault(text.casefold(), text)
    writes = ", ".join(f"“{text}”" for text in list(written.values())[:WRITTEN_TOKENS])
    return f"{reads} → {writes}".strip() if writes else reads


def readable(token: str) -> str:
    """A token as a person reads it: trimmed, newlines as ⏎; empty when it is not text.

    Control characters, halves of characters (U+FFFD) and special tokens such as <unused12> are not
    text.
    """
    text = token.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥").strip()
    if not text and token:
        return "␣"
    if "\ufffd" in text or any(unicodedata.category(char)[0] == "C" for char in text):
        return ""
    return "" if _SPECIAL.fullmatch(text) else text


def label_by_tokens(
    store: ExampleStore, sae: str, features: Sequence[int], model: Path | None, created: str
) -> list[Label]:
    """The `tokens` labels of features, those left out that have no readable token.

    Args:
        sae: Its path or address.
        model: The model's folder, to see which tokens features promote; None: only what they read.
        created: ISO date.

    Raises:
        ConfigError: The model can not be read, or is of another size.
    """
    written = _promoted(sae, features, model) if model is not None else [[] for _ in features]
    labels = []
    for feature, promoted in zip(features, written, strict=True):
        strongest = [e for e in choose_examples(store, feature) if e.kind == TOP]
        text = compose_label(((e.tokens[e.at], e.activation) for e in strongest), promoted)
        if text:
            labels.append(
                Label(
                    index=feature,
                    text=text,
                    labeller=LABELLER,
                    method=METHOD if model is not None else READ_METHOD,
                    created=created,
                    examples=len(strongest),
                )
            )
    return labels


def _promoted(sae: str, features: Sequence[int], model: Path) -> list[list[str]]:
    """The texts of the tokens that each feature promotes."""
    if not features:
        return []
    weight, gain, tokenizer = read_unembedding(model)
    directions = load_sae(sae).W_dec
    if directions.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"model {model} is {weight.shape[1]} wide and the SAE reads {directions.shape[1]}; "
            f"give the model that it was trained on."
        )
    chosen = directions[list(features)].float() * gain
    return [
        [tokenizer.decode([token]) for token in tokens]
        for tokens in promoted_tokens(chosen, weight.float())
    ]
