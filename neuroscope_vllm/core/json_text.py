"""JSON of what users gave, which may not be text: names of files are bytes on Unix."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

_SURROGATE = re.compile("[\ud800-\udfff]")


def to_json(content: Any) -> str:
    """JSON on one line; surrogates, which no encoding has, become U+FFFD."""
    try:
        return msgspec.json.encode(content).decode()
    except UnicodeEncodeError:
        builtins = msgspec.to_builtins(content, str_keys=True)
        written = json.dumps(builtins, ensure_ascii=False, separators=(",", ":"))
        return _SURROGATE.sub("\ufffd", written)
