"""The page of a server that asks for a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from neuroscope_vllm.core.access import KeyDigests, digest
from tests.server.access import ADMIN, USER
from tests.support.browser import needs_browser
from tests.support.page import Site, browser, new_page, open_site, say

__all__ = ["browser", "new_page"]  # fixtures
UNAUTHORIZED = "Failed to load resource: the server responded with a status of 401 (Unauthorized)"
FORBIDDEN = "Failed to load resource: the server responded with a status of 403 (Forbidden)"


@pytest.fixture(scope="module")
def keyed(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, tokenizer_file: Path
) -> Iterator[Site]:
    keys = KeyDigests([digest(ADMIN)], [digest(USER)])
    folder = tmp_path_factory.mktemp("site")
    with open_site(folder, tokenizer, tokenizer_file=tokenizer_file, keys=keys) as one:
        yield one


@needs_browser
def test_the_page_asks_for_a_key_and_goes_on(keyed: Site, new_page: Callable[..., Page]):
    page = new_page(keyed.url, UNAUTHORIZED, FORBIDDEN)
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    field = dialog.get_by_label("key", exact=True)
    expect(field).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "key"
    field.fill("no-key-of-this-server")
    field.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("the key is none of this server's")
    field.fill(USER)
    field.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_have_text("fake")
    expect(page.locator("#watch")).to_have_value("mine")
    say(page, "hi")
    assert page.evaluate("document.cookie") == ""
    page.reload()
    expect(page.locator("#model")).to_have_text("fake")
    page.get_by_role("button", name="Sign out").click()
    expect(dialog).to_be_visible()
    page.close()


@needs_browser
def test_who_declines_is_left_alone_until_asking(keyed: Site, new_page: Callable[..., Page]):
    page = new_page(keyed.url, UNAUTHORIZED)
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    dialog.get_by_role("button", name="Not now").click()
    expect(dialog).to_be_hidden()
    page.wait_for_timeout(2500)  # the page asks every 2 s
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Sign in").click()
    dialog.get_by_label("key", exact=True).fill(ADMIN)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("fake")
    # An admin's key is none of vLLM's.
    page.fill("#text", "hi")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("chats need one of vLLM's own keys")
    dialog.get_by_label("key", exact=True).fill(USER)
    page.keyboard.press("Enter")
    expect(page.locator(".turn").first).to_have_attribute("aria-busy", "false")
    page.close()
