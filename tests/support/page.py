"""The live page under test: a side process that serves it, a browser, and what tests do with both.

Fixtures are to be imported by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from neuroscope_vllm.engine.fake import FakeEngine
from tests.server.side import Side, start_side
from tests.support.browser import playwright
from tests.support.talking import Engine, Talker

HOSTILE = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1>"
LABELS = [HOSTILE, "\u202eevil\u2066 right to left", "👩\u200d👩\u200d👧 emoji", "rivers and lakes"]
TOP_K = 4
REFUSED = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
"""What Chromium's console says of it."""


class Site:
    """A side process with a page, and all that it talks to."""

    def __init__(self, side: Side, talker: Talker, engine: FakeEngine) -> None:
        self.side, self.talker, self.engine = side, talker, engine
        self.url = f"{side.base}/"


@contextmanager
def open_site(
    directory: Path, tokenizer: Any, layers: tuple[int, ...] = (20,), **options: Any
) -> Iterator[Site]:
    """One of its own; `options` of the side process."""
    talker = Talker(tokenizer)
    talker.pause_s = 0.002
    side = start_side(directory, upstream=talker.url, **options)
    with Engine(side.endpoint, layers=layers, top_k=TOP_K) as engine:
        talker.engine = engine
        side.wait_armed()
        yield Site(side, talker, engine)
    side.process.stop()
    talker.close()


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, tokenizer_file: Path
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    labels = directory / "labels.jsonl"
    rows = [
        {
            "index": i,
            "text": LABELS[i % 4] + f" {i}",
            "labeller": "test",
            "score": (None, 0.5)[i % 2],
        }
        for i in range(0, 16_384, 3)
    ]
    rows.append({"index": 1, "text": "long " * 2000, "labeller": "test"})
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {layer: [str(labels)] for layer in (12, 20)}
    with open_site(
        directory, tokenizer, (12, 20), tokenizer_file=tokenizer_file, labels=both
    ) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright() as browser:
        yield browser


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Pages of a test's own; what went wrong in them fails the test."""
    faults: list[str] = []
    contexts = []

    def forget(expected: tuple[str, ...]) -> None:
        assert set(expected) <= set(faults)
        faults[:] = [fault for fault in faults if fault not in expected]

    def open_page(url: str, *expected: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("close", lambda _: forget(expected))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults, faults


def say(page: Page, text: str, turn: int = 0) -> None:
    """Send a message, and wait until its answer's features are there."""
    page.fill("#text", text)
    page.keyboard.press("Enter")
    ended(page, turn)


def ended(page: Page, turn: int = 0) -> None:
    expect(page.locator(".turn").nth(turn)).to_have_attribute("aria-busy", "false", timeout=15_000)


def tokens(page: Page, turn: int = 0, which: int = 0) -> Any:
    return page.locator(".turn").nth(turn).locator(".tokens").nth(which).locator(".t")


def text_of(page: Page, turn: int = 0, which: int = 0) -> str:
    texts = tokens(page, turn, which).evaluate_all(
        "all => all.filter(t => !t.classList.contains('part')).map(t => t.textContent)"
    )
    return "".join(texts).replace("⏎\n", "\n")


def told(site: Site, name: str) -> list[dict[str, Any]]:
    """Token events of layer 12, as the API tells them."""
    (choice,) = site.side.wait_done(name)
    return [e for e in choice["events"] if e["event"] in ("prompt", "token") and e["layer"] == 12]


def names(page: Page) -> list[str]:
    """Ids of the page's requests, from its URL."""
    return re.findall(r"page-[0-9a-f]+", page.url)


def marked(page: Page, kind: str) -> list[int]:
    """Tokens of the first answer with a class, by position."""
    return page.locator(".tokens").first.evaluate(
        "(all, kind) => [...all.querySelectorAll('.t')]"
        ".flatMap((t, i) => t.matches(kind) ? i : [])",
        kind,
    )
