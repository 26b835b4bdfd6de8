"""Which metrics dashboards and rules ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_NO_METRIC = re.compile(
    r"""
    "[^"]*" | \{[^}]*\} | \[[^]]*\]              # values, selectors, ranges
    | \b(by|on|ignoring)\s*\([^)]*\) | \bgroup_left\b
    """,
    re.VERBOSE,
)


def metrics_in(expression: str) -> set[str]:
    """Metrics that a PromQL expression asks for; functions are followed by a bracket."""
    bare = _NO_METRIC.sub("", expression)
    return set(re.findall(r"\b[a-z][a-z0-9_:]*_[a-z0-9_:]+\b(?! *\()", bare))


def expressions_in(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "definition") and isinstance(value, str):
                yield value
            else:
                yield from expressions_in(value)
    elif isinstance(node, list):
        for one in node:
            yield from expressions_in(one)
