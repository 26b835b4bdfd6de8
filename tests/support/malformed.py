"""Specifications of steering that are wrong, each in its own way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MALFORMED: list[Any] = [
    *("", "x", "[]", "null", "1", '"a"', "{", '{"steer"}', "\ud83d", "{" * 5000, '{"steer": null}'),
    *('{"steer": {}}', '{"steer": [1]}', '{"steer": [[]]}', '{"steer": "add"}', '{"stear": []}'),
    *('{"preset": "none"}', '{"preset": 3}', '{"preset": ["both", ""]}', '{"rules": 1}'),
    '{"steer": [{"op": "add", "layer": 20, "feature": 1, "value": NaN}]}',
    '{"steer": [{"op": "add", "layer": 20, "feature": 1, "value": 1e999}]}',
    '{"steer": [{"op": "add", "layer": 20, "feature": 1, "value": 1}, {}]}',
    '{"steer": [{"op": "add", "layer": 20, "feature": 99999999999999999999, "value": 1}]}',
]
GOOD = {"op": "add", "layer": 20, "feature": 1, "value": 1.0}
SPOILT: list[dict[str, Any]] = [
    *({"op": op} for op in ("sub", "", None, 1, "ADD", "ablate", "direction", [], {})),
    *({"layer": x} for x in (-1, 4, 21, 1 << 40, "20", 20.5, None, True, [], 1e300)),
    *({"feature": x} for x in (-1, 512, 1 << 31, "1", 1.5, None, False, [1], {})),
    *({"value": x} for x in (None, "1", 1e7, -1e300, [], True, "nan", {})),
    *({"unit": x} for x in ("max", "sigma", 1, None, "RAW")),
    *({"positions": x} for x in ("some", 1, None, ["all"])),
    *({"op": "direction", "direction": x, "feature": None} for x in ("six", "", 1, None, "../v")),
    *({"direction": "seven"}, {"extra": 1}, {"op": "ablate", "value": 2}),
    *({"op": "scale", "unit": "max"}, {"op": "direction", "direction": "seven"}),
    {"op": "clamp", "value": None},
    {"op": "direction", "direction": "seven", "feature": None, "layer": 20},
]  # fmt: skip
WHEN = {"layer": 20, "feature": 3, "above": 1.0}
RULES: list[Any] = [
    *({"when": WHEN}, {"stop": True}, {"when": {}, "stop": True}, {"when": WHEN, "tag": "x" * 65}),
    *({"when": {**WHEN, "last": x}, "stop": True} for x in (0, -1, 1 << 40, "1")),
    *({"when": {**WHEN, "above": x}, "stop": True} for x in (None, "1", 1e9)),
    *({"when": {**WHEN, "feature": x}, "stop": True} for x in (-1, 512, None)),
    {"when": WHEN, "steer": [{**GOOD, "positions": "prompt"}]},
    {"when": WHEN, "steer": [{**GOOD, "feature": -1}]},
    {"when": WHEN, "tag": ""},
    {"when": WHEN, "stop": True, "name": ""},
]


def malformed() -> Iterator[str]:
    yield from MALFORMED
    for spoilt in SPOILT:
        yield json.dumps({"steer": [{**GOOD, **spoilt}]})
    for rule in RULES:
        yield json.dumps({"rules": [rule]})
    yield json.dumps({"steer": [GOOD] * 9})
    yield json.dumps({"steer": [GOOD] * 10_000})
    yield json.dumps({"rules": [{"when": WHEN, "tag": "t"}] * 5})
    yield json.dumps({"preset": ["both"] * 20})
