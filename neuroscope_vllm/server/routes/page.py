"""GET / and /static/…: the live page; GET /export/{request_id}: a trace as one HTML file."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import PurePosixPath
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from neuroscope_vllm.core.detokenize import special_ids
from neuroscope_vllm.core.recording.page import html_page
from neuroscope_vllm.core.recording.record import About, of_answer
from neuroscope_vllm.server.access import Caller
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.rights import Rights
from neuroscope_vllm.server.routes import requests
from neuroscope_vllm.server.sse import LongResponse

TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",  # an upgraded server must not run half of an old page
}

MAX_EXPORTS = 4
"""Files that are made or sent at the same time: each is in memory as a whole."""
PIECE = 1 << 16
RETRY_AFTER_S = 5

router = APIRouter(include_in_schema=False)


class Exports:
    """Room for MAX_EXPORTS files, one of a caller that is no admin, of which one is made at a time:
    that takes ten times its size."""

    def __init__(self, counters: Counter[str]) -> None:
        self.turn = asyncio.Lock()
        self._counters = counters
        self._whose: list[bytes | None] = []

    @contextlib.contextmanager
    def place(self, rights: Rights) -> Iterator[None]:
        """Raises ApiError where there is none, and counts that in `exports_refused`."""
        who = rights.who
        if len(self._whose) >= MAX_EXPORTS or (who is not None and who in self._whose):
            self._counters["exports_refused"] += 1
            message = (
                f"{len(self._whose)} requests are exported already, of {MAX_EXPORTS} at a time and"
                " one with a user key; try again later."
            )
            raise ApiError(503, message, retry_after=RETRY_AFTER_S)
        self._whose.append(who)
        try:
            yield
        finally:
            self._whose.remove(who)


@router.get("/")
async def page() -> Response:
    return _file("index.html")


@router.get("/static/{name:path}")
async def static(name: str) -> Response:
    return _file(name)


@router.get("/export/{request_id:path}")
async def export(request: Request, request_id: str) -> Response:
    """All choices of a kept request as one HTML file that asks the network for nothing."""
    hub: Hub = request.app.state.hub
    caller: Caller = request.state.caller
    kept = requests.kept(hub, caller, request_id)
    exports: Exports = request.app.state.exports
    about = About(
        model=hub.model,
        sites=hub.senders.sites(),
        special_token_ids=special_ids(hub.tokenizer),
    )
    name = quote(f"{request_id}.html", safe="")
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{name}"}
    with contextlib.ExitStack() as holding:
        holding.enter_context(exports.place(caller.rights))
        async with exports.turn:
            parts: list[bytes] = []
            for part in kept:
                parts.append(part)
                await asyncio.sleep(0)
            source = str(request.base_url)
            html = await asyncio.to_thread(_one_file, about, b"".join(parts), source)
        pieces = (html[at : at + PIECE] for at in range(0, len(html), PIECE))
        return LongResponse(hub, pieces, holding.pop_all().close, "text/html", headers)


def _one_file(about: About, kept: bytes, source: str) -> bytes:
    return html_page(about, [trace for trace, _ in of_answer(kept)], source).encode()


def _file(name: str) -> Response:
    content = _files().get(name)
    if content is None:
        raise ApiError(404, f"the page has no file {name!r}.")
    return Response(content, media_type=TYPES[PurePosixPath(name).suffix], headers=HEADERS)


@cache
def _files() -> dict[str, bytes]:
    """All files of the page by their path below static/: nothing else can be asked for."""
    found: dict[str, bytes] = {}
    folders = [("", resources.files("neuroscope_vllm.server").joinpath("static"))]
    while folders:
        before, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{before}{entry.name}/", entry))
            elif PurePosixPath(entry.name).suffix in TYPES:
                found[before + entry.name] = entry.read_bytes()
    return found
