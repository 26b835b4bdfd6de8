"""Texts with coloured tokens as one HTML file, which asks the network for nothing.

The page's own script reads the data from a JSON element, and puts it in the document as text only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import msgspec

from neuroscope_vllm.core.inspection.record import Firings, Token, Tracked
from neuroscope_vllm.core.json_text import to_json


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
    }
    template = resources.files("neuroscope_vllm.core.inspection").joinpath("page.html").read_text()
    for name, value in (("POLICY", _policy(template)), ("DATA", _inert(data))):
        template = template.replace(f"[[{name}]]", value, 1)
    return template


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


def _inert(data: dict[str, Any]) -> str:
    """JSON that no HTML parser finds an end, a comment or an element in."""
    return to_json(data).replace("<", "\\u003c")


def _policy(html: str) -> str:
    """Allows the page's own script and style, and nothing else."""
    script, style = (_hash(html, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; base-uri 'none';"
        " form-action 'none'"
    )


def _hash(html: str, tag: str) -> str:
    match = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert match is not None, tag
    digest = hashlib.sha256(match[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
