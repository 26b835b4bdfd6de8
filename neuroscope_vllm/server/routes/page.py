"""GET /: the live page, one static file."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from fastapi import APIRouter, Response

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    html, policy = _page()
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    return Response(html, media_type="text/html", headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The page, and a policy that allows its own script and style and nothing else."""
    html = resources.files("neuroscope_vllm.server").joinpath("static/index.html").read_text()
    script, style = (_hash(html, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src {script}; style-src {style};"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(html: str, tag: str) -> str:
    match = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert match is not None, tag
    digest = hashlib.sha256(match[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
