"""Pages of one file, which ask the network for nothing. Torch-free.

A page's own script reads its data from a JSON element, and puts it in the document as text only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Any

from neuroscope_vllm.core.json_text import to_json


def filled(package: str, name: str, data: dict[str, Any]) -> str:
    """The page: a template of a package with its [[DATA]] and its [[POLICY]].

    The policy allows its own script and style, and nothing else. [[PRELUDE]] in a script is what
    most of them begin with.
    """
    template = resources.files(package).joinpath(name).read_text()
    prelude = resources.files("neuroscope_vllm.core").joinpath("page_prelude.js").read_text()
    template = template.replace("[[PRELUDE]]\n", prelude, 1)
    for mark, value in (("POLICY", _policy(template)), ("DATA", _inert(data))):
        template = template.replace(f"[[{mark}]]", value, 1)
    return template


def _inert(data: dict[str, Any]) -> str:
    """JSON that no HTML parser finds an end, a comment or an element in."""
    return to_json(data).replace("<", "\\u003c")


def _policy(html: str) -> str:
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
