"""Texts with coloured tokens as one HTML file, which asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from neuroscope_vllm.core.html_page import filled
from neuroscope_vllm.core.inspection.record import Firings, Token, Tracked


class PageText(msgspec.Struct, kw_only=True):
    """One text of a page.

    Attributes:
        heading: What it is.
        tokens: By position, then layer.
        firings: Where features fire; None: known only where they are top features.
        features: Those that were asked for; the first colours the page.
    """

    heading: str
    tokens: Sequence[Token]
    firings: Firings | None = None
    features: Sequence[Tracked] = ()


def trace_page(title: str, about: Sequence[str], texts: Sequence[PageText]) -> str:
    """The page.

    Args:
        title: Its title and heading.
        about: Lines on where it comes from.
        texts: What it shows, in this order.
    """
    labels: dict[int, dict[int, str]] = {}
    data = {
        "title": title,
        "about": list(about),
        "feature": next((f.index for text in texts for f in text.features), None),
        "layers": sorted({token.layer for text in texts for token in text.tokens}),
        "texts": [_text(text, labels) for text in texts],
        "labels": labels,
        "unreliable": _unreliable(texts),
    }
    return filled("neuroscope_vllm.core.inspection", "page.html", data)


def _text(text: PageText, labels: dict[int, dict[int, str]]) -> dict[str, Any]:
    """The text's tokens, then by layer what is known of them; `labels` is added to."""
    layers: dict[int, list[Token]] = {}
    for token in text.tokens:
        layers.setdefault(token.layer, []).append(token)
        known = labels.setdefault(token.layer, {})
        known.update({f.index: f.label for f in token.top_features if f.label is not None})
    for feature in text.features:
        if feature.label is not None:
            labels.setdefault(feature.layer, {})[feature.index] = feature.label
    first = next(iter(layers.values()), [])
    return {
        "heading": text.heading,
        "complete": text.firings is not None,
        "tokens": [(token.position, token.token, token.token_id) for token in first],
        "layers": {
            layer: {
                "rows": [
                    {
                        "top": [(f.index, f.activation, f.score) for f in token.top_features],
                        "l0": token.l0,
                        "note": token.note,
                    }
                    for token in tokens
                ],
                "firings": _firings(text, layer, tokens),
            }
            for layer, tokens in layers.items()
        },
    }


def _unreliable(texts: Iterable[PageText]) -> dict[int, list[int]]:
    """By layer, the features whose label is."""
    found: dict[int, set[int]] = {}
    for text in texts:
        tops = ((token.layer, f) for token in text.tokens for f in token.top_features)
        asked = ((feature.layer, feature) for feature in text.features)
        for layer, feature in (*tops, *asked):
            if feature.unreliable:
                found.setdefault(layer, set()).add(feature.index)
    return {layer: sorted(indices) for layer, indices in found.items()}


def _firings(
    text: PageText, layer: int, tokens: Iterable[Token]
) -> dict[int, list[tuple[int, float]]]:
    """By feature: where it fires, as indices of `tokens`, and its activations."""
    found: dict[int, list[tuple[int, float]]] = {}
    if text.firings is not None:
        at = {token.position: i for i, token in enumerate(tokens)}
        for index, firings in text.firings.get(layer, {}).items():
            found[index] = [(at[position], value) for position, value in firings]
        return found
    for i, token in enumerate(tokens):
        for feature in token.top_features:
            found.setdefault(feature.index, []).append((i, feature.activation))
    return found
