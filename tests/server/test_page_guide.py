"""What the page suggests to who has not asked anything yet."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

from tests.server.side import start_side, wait_until
from tests.support.browser import needs_browser
from tests.support.page import Site, browser, ended, new_page, open_site
from tests.support.talking import Engine

__all__ = ["browser", "new_page"]  # fixtures

GUIDE = """
suggestions:
  - {title: A city, prompt: "What is the capital of France?", look_for: Places., max_tokens: 9}
  - {title: <b>Calm</b>, prompt: "How are you?", preset: calm}
"""


@pytest.fixture(scope="module")
def guided(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, tokenizer_file: Path
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("guided")
    guide, steering = folder / "guide.yaml", folder / "steering.yaml"
    guide.write_text(GUIDE)
    steering.write_text("presets: {calm: [{op: add, layer: 20, feature: 1, value: 2}]}\n")
    settings = {"guide": str(guide), "steering": str(steering)}
    with open_site(folder, tokenizer, tokenizer_file=tokenizer_file, settings=settings) as one:
        yield one


@needs_browser
def test_a_suggestion_is_asked(guided: Site, new_page: Callable[..., Page]):
    page = new_page(guided.url)
    guide = page.get_by_role("region", name="suggestions")
    expect(guide).to_contain_text("Places.")
    guide.get_by_role("button", name="A city").click()
    ended(page)
    body = guided.talker.bodies[-1]
    assert body["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert (body["temperature"], body["max_tokens"]) == (0, 9)
    expect(page.locator(".turn")).to_contain_text("Places.")
    page.reload()
    expect(page.locator(".turn")).to_contain_text("Places.")
    expect(guide).to_be_hidden()
    page.get_by_role("button", name="New chat").click()
    expect(guide).to_be_visible()


@needs_browser
def test_one_with_a_preset_is_answered_with_and_without(
    guided: Site, new_page: Callable[..., Page]
):
    page = new_page(guided.url)
    page.get_by_text("Options").click()
    page.get_by_label("system message").fill("Be brief.")
    suggested = page.get_by_role("button", name="<b>Calm</b>")
    expect(suggested).to_have_accessible_description(
        "Answered twice: without, and steered by preset calm."
    )
    suggested.click()
    expect(page.locator("#text")).to_be_focused()
    ended(page)
    expect(page.locator(".answer h3")).to_have_text(["without", "preset calm"])
    plain, steered = sorted(guided.talker.bodies[-2:], key=lambda body: "vllm_xargs" in body)
    assert "vllm_xargs" not in plain
    assert json.loads(steered["vllm_xargs"]["neuroscope"]) == {"preset": "calm"}
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How are you?"},
    ]
    assert plain["messages"] == steered["messages"] == asked
    assert plain["temperature"] == steered["temperature"] == 0


def test_a_guide_that_is_gone_when_the_side_process_starts_again_is_left_out(tmp_path: Path):
    guide = tmp_path / "guide.yaml"
    guide.write_text(GUIDE.replace(", preset: calm", ""))
    settings = {"guide": str(guide)}
    side = start_side(tmp_path, upstream="http://127.0.0.1:9", settings=settings)
    try:
        with Engine(side.endpoint):
            side.wait_armed()
            assert len(side.get("/v1/features/describe").json()["guide"]) == 2
            guide.unlink()
            before = side.get("/v1/features/describe").json()["epoch"]
            assert side.process.pid is not None
            os.kill(side.process.pid, signal.SIGKILL)

            def is_another() -> bool:
                with contextlib.suppress(httpx.HTTPError):  # the old one's connection
                    return side.get("/v1/features/describe").json()["epoch"] != before
                return False

            wait_until(is_another)
            side.wait_armed()
            assert side.get("/v1/features/describe").json()["guide"] == []
    finally:
        side.process.stop()
