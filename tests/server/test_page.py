"""The live page in a real Chromium, against a real side process that a fake engine feeds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, Route, expect

from neuroscope_vllm.engine.fake import features_of
from tests.server.side import wait_until
from tests.support.browser import needs_browser
from tests.support.page import (
    HOSTILE,
    TOP_K,
    Site,
    browser,
    ended,
    marked,
    names,
    new_page,
    say,
    site,
    text_of,
    tokens,
    told,
)
from tests.support.talking import chat

__all__ = ["browser", "new_page", "site"]  # fixtures


@needs_browser
def test_chat_hover_pin_and_the_same_after_a_reload(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url)
    expect(page.locator("#trust")).to_contain_text("L0 61.5 (expected 58), 74.2 % of variance")
    say(page, "hello")
    whole = chat([{"role": "user", "content": "hello"}]) + "You said hello."
    assert text_of(page) == whole
    events = told(site, names(page)[0])
    # A token's features, as the engine had them, without dense ones; best first.
    tokens(page).nth(8).hover()
    expect(page.locator("#which")).to_contain_text(f"at 8, token {events[8]['token_id']}")
    found = features_of(events[8]["token_id"], 8, 12, TOP_K)
    shown = [index for index, _ in found if index % 5]
    rows = page.locator("#token-features .row small")
    assert [int(re.findall(r"feature (\d+)", text)[0]) for text in rows.all_inner_texts()] == shown
    # A feature's tokens.
    page.locator("#token-features .row .feature").first.hover()
    wait_until(lambda: 8 in marked(page, ".hit"), 5)
    fires = [
        i for i, e in enumerate(events) if any(f["index"] == shown[0] for f in e["top_features"])
    ]
    assert marked(page, ".hit") == fires
    # Pin both; other tokens no longer change what is shown.
    page.locator("#token-features .row .feature").first.click()
    tokens(page).nth(8).click()
    tokens(page).nth(20).hover()
    expect(page.locator("#which")).to_contain_text("at 8, ")
    expect(page.locator("#which")).to_contain_text("(pinned)")
    assert page.locator("#colour").input_value() == f"12:{shown[0]}"
    before = marked(page, "[data-level]")
    assert before == fires
    page.select_option("#sort", "frequency")
    page.reload()
    ended(page)
    expect(page.locator("#which")).to_contain_text("at 8, ")
    expect(page.locator("#which")).to_contain_text("(pinned)")
    assert text_of(page) == whole
    assert marked(page, "[data-level]") == before
    special = [i for i, e in enumerate(events) if e["token_id"] == events[0]["token_id"]]
    assert marked(page, ".special") == special
    assert page.locator("#sort").input_value() == "frequency"
    expect(page.locator("#pins .row")).to_have_count(1)
    page.select_option("#colour", "")
    wait_until(lambda: len(marked(page, "[data-level]")) > len(fires), 5)


@needs_browser
def test_turns_are_resent_edited_and_come_back(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url + "#watch=mine")
    say(page, "one")
    say(page, "two", turn=1)
    assert [m["content"] for m in site.talker.bodies[-1]["messages"]] == [
        "one",
        "You said one.",
        "two",
    ]
    # What the first turn shows already is folded away in the second.
    assert not text_of(page, 1).startswith("<eos>user: one")
    page.locator(".fold").click()
    assert text_of(page, 1).startswith("<eos>user: one")
    page.locator(".turn").first.get_by_role("button", name="Edit").click()
    page.locator(".editing textarea").fill("three")
    page.get_by_role("button", name="Send instead").click()
    expect(page.locator(".turn")).to_have_count(1)
    ended(page)
    assert "You said three." in text_of(page)
    assert [m["content"] for m in site.talker.bodies[-1]["messages"]] == ["three"]
    page.get_by_role("button", name="Resend").click()
    ended(page)
    assert "You said three." in text_of(page)
    page.go_back()
    page.go_back()
    expect(page.locator(".turn")).to_have_count(2)
    ended(page, 1)
    assert "You said two." in text_of(page, 1)


@needs_browser
def test_it_is_all_done_by_keys(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url)
    page.locator("#text").focus()
    page.keyboard.type("keys")
    page.keyboard.press("Enter")
    ended(page)
    for _ in range(20):  # from the message box round to the text
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('t')"):
            break
    press, here = page.keyboard.press, "document.activeElement.at"
    press("Home")
    assert page.evaluate(here) == 0
    for _ in range(3):
        press("ArrowRight")
    press("ArrowLeft")
    assert page.evaluate(here) == 2
    assert page.locator("#turns [tabindex]").count() == 1
    assert page.locator("#turns .t[role=button]").count() == 1
    expect(page.locator("#which")).to_contain_text("at 2, ")
    press("ArrowDown")
    press("ArrowDown")
    press("ArrowUp")
    expect(page.locator("#token-features .row").first).to_have_class(re.compile("chosen"))
    expect(page.locator("#said")).to_contain_text("feature ")
    press("Enter")
    expect(page.locator("#pins .row")).to_have_count(1)
    press("Escape")
    press("Enter")
    expect(page.locator("#which")).to_contain_text("(pinned)")
    press("Escape")
    expect(page.locator("#which")).not_to_contain_text("(pinned)")
    press("/")
    assert page.evaluate("document.activeElement.id") == "query"


@needs_browser
def test_hostile_text_stays_text(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url)
    message = f"{HOSTILE} \u202eevil\u2066 👩\u200d👩\u200d👧 &amp;"
    say(page, message)
    assert "<img src=x onerror=window.owned=1>" in text_of(page)
    assert "👩" in text_of(page)
    assert "\\u{202e}evil\\u{2066}" in text_of(page)
    page.fill("#query", "script")
    page.keyboard.press("Enter")
    expect(page.locator("#found .row").first).to_contain_text("</script><script>")
    page.fill("#query", "1")
    page.keyboard.press("Enter")
    row = page.locator("#found .row").first
    expect(row).to_contain_text("long long")
    assert row.bounding_box()["height"] < 150
    row.locator(".open").click()
    expect(page.locator("#card h2")).to_contain_text("long long")
    expect(page.locator("#card .examples")).to_contain_text("No examples")
    assert page.evaluate("window.owned") is None
    assert page.locator("#turns img, aside img, dialog img, body script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_others_are_watched_and_pausing_loses_nothing(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url + "#watch=chatcmpl-other")
    site.engine.run("chatcmpl-other", [1, 2], [3, 4])
    expect(tokens(page)).to_have_count(4)
    site.engine.run("chatcmpl-third", [1, 2], [3, 4])
    site.side.wait_done("chatcmpl-third")
    expect(page.locator(".turn")).to_have_count(1)
    page.select_option("#watch", "all")
    expect(page.locator(".turn", has_text="chatcmpl-third").locator(".t")).to_have_count(4)
    page.click("#pause")
    site.engine.run("chatcmpl-paused", [1, 2], [3, 4, 5])
    site.side.wait_done("chatcmpl-paused")
    page.wait_for_timeout(200)
    expect(page.locator(".turn", has_text="chatcmpl-paused")).to_have_count(0)
    page.click("#pause")
    expect(page.locator(".turn", has_text="chatcmpl-paused").locator(".t")).to_have_count(5)
    page.select_option("#watch", "mine")
    expect(page.locator(".turn")).to_have_count(0)


@needs_browser
def test_layers_stand_side_by_side_and_doubt_shows(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url + "#layer=all")
    say(page, "layers")
    tokens(page).nth(8).click()
    expect(page.locator("#token-features h3")).to_have_text(
        [re.compile("layer 12 · L0"), re.compile("layer 20 · L0")]
    )
    doubt = page.locator(".doubt").first
    expect(doubt).to_have_attribute("title", re.compile("unreliable"))
    assert doubt.inner_text().endswith("?")
    # Dense features, then special tokens.
    rows = page.locator("#token-features .row")
    some = rows.count()
    page.uncheck("#dense")
    expect(rows).to_have_count(2 * TOP_K)
    assert some < 2 * TOP_K
    tokens(page).nth(8).click()
    tokens(page).nth(0).click()
    expect(page.locator("#token-features")).to_contain_text("a special token")
    page.uncheck("#special")
    expect(rows).to_have_count(2 * TOP_K)
    page.click("#as-table")
    expect(page.locator("#table tbody tr")).to_have_count(2 * len(told(site, names(page)[0])))


@needs_browser
def test_a_narrow_page_and_less_motion(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url, viewport={"width": 320, "height": 640}, reduced_motion="reduce")
    say(page, "narrow " * 20)
    tokens(page).nth(8).click()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    durations = page.locator(".t, .bar").evaluate_all(
        "all => [...new Set(all.map(one => getComputedStyle(one).transitionDuration))]"
    )
    assert durations == ["0s"]


@needs_browser
def test_a_message_that_fails_says_why(site: Site, new_page: Callable[..., Page], new_side: Any):
    failed = "Failed to load resource: the server responded with a status of 503 "
    page = new_page(new_side().base, failed + "(Service Unavailable)")
    with page.expect_response("**/v1/chat/completions") as answer:
        page.fill("#text", "hi")
        page.keyboard.press("Enter")
    assert answer.value.status == 503
    expect(page.locator(".turn [role=alert]")).to_contain_text("knows no vLLM server")


def test_the_page_allows_nothing_but_itself(site: Site):
    answer = site.side.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    own = re.findall(r'(?:src|href)="([^"]*)"', answer.text)
    assert len(own) > 4
    for path in own:
        file = site.side.get(f"/{path}")
        assert file.status_code == 200
        assert "://" not in file.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<style|<script>|\son[a-z]+=|\sstyle=", answer.text)
    for path in ("js/none.js", "../page.py", "%2e%2e/page.py", "js", ""):
        assert site.side.get(f"/static/{path}").status_code == 404


@needs_browser
def test_what_a_gap_swallowed_is_fetched(site: Site, new_page: Callable[..., Page]):
    page = new_page("about:blank")
    lost = {"reason": "slow_reader", "count": 40}
    body = f"event: gap\ndata: {json.dumps(lost)}\n\n"

    def stream(route: Route) -> None:
        """A reader that was too slow, then one who is told that all is over."""
        nonlocal body
        said, body = body, ""
        status = 200 if said else 204
        route.fulfill(status=status, body=said, headers={"content-type": "text/event-stream"})

    site.engine.run("chatcmpl-gone-by", [1, 2], [3, 4])
    site.side.wait_done("chatcmpl-gone-by")
    page.route("**/v1/features/stream?**", stream)
    page.goto(site.url + "#watch=chatcmpl-gone-by")
    expect(tokens(page)).to_have_count(4)
    expect(page.locator("#notices")).to_contain_text("gap: 40 events (slow reader)")


@needs_browser
def test_a_request_heard_from_its_middle_on_is_shown_whole(
    site: Site, new_page: Callable[..., Page]
):
    page = new_page("about:blank")
    site.engine.run("chatcmpl-late", [1, 2], [3, 4, 5])
    (choice,) = site.side.wait_done("chatcmpl-late")
    late = next(e for e in choice["events"] if e["event"] == "token")
    body = f"event: token\ndata: {json.dumps(late)}\n\n"
    page.route("**/v1/requests", lambda route: (page.wait_for_timeout(300), route.continue_()))
    page.route(
        "**/v1/features/stream",
        lambda route: route.fulfill(body=body, headers={"content-type": "text/event-stream"}),
        times=1,
    )
    page.goto(site.url)
    expect(page.locator(".turn", has_text="chatcmpl-late").locator(".t")).to_have_count(5)
