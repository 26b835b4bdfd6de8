"""Makes feature cards from what lies on this machine: calibration, examples, weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from neuroscope_vllm.core.artefacts import pinned
from neuroscope_vllm.core.calibration import (
    BINS_PER_OCTAVE,
    DENSE_FREQUENCY,
    LOG2_MIN,
    NUM_BINS,
    Calibration,
)
from neuroscope_vllm.core.cards.record import (
    WEIGHTS,
    Card,
    Examples,
    Histogram,
    Neighbour,
    Quantile,
    ShownExample,
    TokenLogit,
    Wanted,
)
from neuroscope_vllm.core.errors import ConfigError, NeuroscopeError
from neuroscope_vllm.core.examples.records import SAMPLE, TOP, Example
from neuroscope_vllm.core.examples.store import ExampleStore, find_examples
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.unembedding import Unembedding, read_unembedding
from neuroscope_vllm.core.wire import Site

TOP_SHOWN, QUANTILES, QUANTILE_SHOWN = 10, 4, 3
TOKENS_SHOWN, NEIGHBOURS_SHOWN = 10, 10
_ROWS = 16_384  # of a weight that are float32 at a time

_sae = functools.lru_cache(maxsize=2)(load_sae)
_calibration = functools.lru_cache(maxsize=8)(Calibration.load)
_examples = functools.lru_cache(maxsize=8)(ExampleStore)


def read_card(wanted: Wanted) -> Card:
    """The card of a feature that exists. What can not be had is said in `missing`."""
    site, index = wanted.site, wanted.index
    info = site.sae
    card = Card(layer=site.layer, index=index, width=info.width, sae=info.source)
    if info.neuronpedia_id is not None:
        card.neuronpedia = f"https://www.neuronpedia.org/{info.neuronpedia_id}/{index}"
    _add_statistics(card, site)
    _add_examples(card, site)
    if wanted.weights:
        _add_weights(card, site, wanted.model)
    return card


def _add_statistics(card: Card, site: Site) -> None:
    if site.calibration is None:
        card.missing["density"] = card.missing["histogram"] = (
            "this SAE has no calibration; make one with `neuroscope calibrate`."
        )
        return
    try:
        found = _calibration(site.calibration)
    except NeuroscopeError as error:
        card.missing["density"] = card.missing["histogram"] = str(error)
        return
    firings = int(found.firings[card.index])
    card.tokens, card.firings = found.tokens, firings
    card.density = firings / max(found.tokens, 1)
    card.dense = card.density > DENSE_FREQUENCY
    card.max = float(found.maximum[card.index])
    if firings:
        card.mean = float(found.total[card.index]) / firings
        card.histogram = _histogram(found.histogram[card.index])


def _histogram(counts: Tensor) -> Histogram:
    """From the first bin that holds something to the last."""
    held = counts.nonzero().squeeze(1)
    first, last = int(held[0]), int(held[-1])
    # The first bin begins at 0; the last, which has no end, is drawn as wide as the others.
    edges = [2.0 ** (LOG2_MIN + i / BINS_PER_OCTAVE) for i in range(NUM_BINS)]
    return Histogram([0.0, *edges][first : last + 2], counts[first : last + 1].tolist())


def _add_examples(card: Card, site: Site) -> None:
    try:
        folder = find_examples(site.sae.source, site.sae_input)
        if folder is None:
            card.missing["examples"] = "none were collected; `neuroscope collect` does."
            return
        found = _examples(folder).of(card.index)
    except NeuroscopeError as error:
        card.missing["examples"] = str(error)
        return
    top = [_shown(example) for example in found if example.kind == TOP][:TOP_SHOWN]
    card.examples = Examples(top, _quantiles([one for one in found if one.kind == SAMPLE]))


def _quantiles(sample: Sequence[Example]) -> list[Quantile]:
    ordered = sorted(sample, key=lambda one: -one.activation)
    count = min(QUANTILES, len(ordered))
    cuts = [round(i * len(ordered) / count) for i in range(count + 1)] if count else []
    parts = [ordered[low:high] for low, high in itertools.pairwise(cuts)]
    return [
        Quantile(part[-1].activation, part[0].activation, [_shown(one) for one in _spread(part)])
        for part in parts
    ]


def _spread(part: Sequence[Example]) -> list[Example]:
    """A few of them, from the strongest to the weakest."""
    if len(part) <= QUANTILE_SHOWN:
        return list(part)
    last = len(part) - 1
    return [part[round(i * last / (QUANTILE_SHOWN - 1))] for i in range(QUANTILE_SHOWN)]


def _shown(example: Example) -> ShownExample:
    return ShownExample(example.activation, example.tokens, example.activations, example.at)


def _add_weights(card: Card, site: Site, model: str | None) -> None:
    try:
        sae = _sae(pinned(site.sae.source, site.sae.revision))
    except NeuroscopeError as error:
        card.missing |= dict.fromkeys(WEIGHTS, str(error))
        return
    card.neighbours = neighbours(sae, card.index)
    try:
        if model is None:
            raise ConfigError("the model is not known here, so its tokens are not.")
        unembedding = _unembedding(model)
        if unembedding.weight.shape[1] != sae.d_model:
            raise ConfigError("the model's unembedding is of another size than the SAE.")
    except NeuroscopeError as error:
        card.missing["promoted"] = card.missing["suppressed"] = str(error)
        return
    card.promoted, card.suppressed = token_logits(sae, card.index, unembedding)


@functools.lru_cache(maxsize=1)
def _unembedding(model: str) -> Unembedding:
    """Raises ConfigError."""
    if (folder := Path(model).expanduser()).is_dir():
        return read_unembedding(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        found = snapshot_download(repository, revision=revision or None, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        raise ConfigError(f"model {model} is not on this machine, so its tokens are not.") from None
    return read_unembedding(Path(found))


def neighbours(sae: SAE, index: int) -> list[Neighbour]:
    """Features of the largest cosine, largest first; none without a direction."""
    direction = torch.nn.functional.normalize(sae.W_dec[index].float(), dim=0)
    cosine = torch.cat(
        [
            torch.nn.functional.cosine_similarity(rows.float(), direction.unsqueeze(0))
            for rows in sae.W_dec.split(_ROWS)
        ]
    )
    cosine[index] = -2.0  # not itself
    value, found = cosine.topk(min(NEIGHBOURS_SHOWN, len(cosine) - 1))
    return [
        Neighbour(index=i, cosine=v)
        for v, i in zip(value.tolist(), found.tolist(), strict=True)
        if v > 0
    ]


def token_logits(
    sae: SAE, index: int, unembedding: Unembedding
) -> tuple[list[TokenLogit], list[TokenLogit]]:
    """Tokens promoted and suppressed, furthest first: W_dec[index] · (gain * W_U)."""
    direction = sae.W_dec[index].float() * unembedding.gain
    logits = torch.cat([rows.float() @ direction for rows in unembedding.weight.split(_ROWS)])

    def furthest(largest: bool) -> list[TokenLogit]:
        value, ids = logits.topk(min(TOKENS_SHOWN, len(logits)), largest=largest)
        decode = unembedding.tokenizer.decode
        return [
            TokenLogit(token, decode([token], skip_special_tokens=False), logit)
            for token, logit in zip(ids.tolist(), value.tolist(), strict=True)
        ]

    return furthest(largest=True), furthest(largest=False)
