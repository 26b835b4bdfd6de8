"""The page where something goes wrong, or somebody does what nobody thought of."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

from tests.support.browser import needs_browser
from tests.support.page import (
    REFUSED,
    Site,
    browser,
    ended,
    names,
    new_page,
    say,
    site,
    text_of,
    tokens,
)

__all__ = ["browser", "new_page", "site"]  # fixtures


def messages(site: Site) -> list[str]:
    return [one["content"] for one in site.talker.bodies[-1]["messages"]]


@needs_browser
def test_a_turn_that_failed_is_no_history(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url + "#watch=mine", REFUSED)
    error = {"error": {"message": "the prompt is too long", "code": 400}}
    chats = "**/v1/chat/completions"
    page.route(chats, lambda route: route.fulfill(status=400, json=error), times=1)
    page.fill("#text", "too long")
    page.keyboard.press("Enter")
    failed = page.locator(".turn").first
    expect(failed.get_by_role("alert")).to_have_text("chat: the prompt is too long")
    expect(failed).to_have_attribute("aria-busy", "false")
    expect(page.locator("#state")).to_contain_text("the prompt is too long")
    say(page, "hi", turn=1)
    assert messages(site) == ["hi"]
    page.close()


@needs_browser
def test_what_stood_side_by_side_goes_on_side_by_side(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url + "#watch=mine&card=12:7")
    page.locator("#card form.steer textarea").fill("hi")
    page.get_by_role("button", name="Answer with and without").click()
    ended(page)
    expect(page.locator(".turn h3").first).to_have_text("without")
    expect(page.locator(".turn h3").nth(1)).to_contain_text("add feature 7")
    say(page, "more", turn=1)
    plain, steered = site.talker.bodies[-2:]
    if "vllm_xargs" in plain:  # both were sent at once
        plain, steered = steered, plain
    said = [[one["content"] for one in body["messages"]] for body in (plain, steered)]
    assert said == [["hi", "You said hi.", "more"], ["hi", "You shout HI!", "more"]]
    assert "vllm_xargs" not in plain
    assert steered["temperature"] == plain["temperature"] == 0
    page.locator(".turn").nth(1).get_by_role("button", name="Edit").click()
    page.locator(".editing textarea").fill("less")
    page.keyboard.press("Enter")
    ended(page, 1)
    assert "You shout LESS!" in text_of(page, 1, 1)
    assert page.evaluate("document.activeElement.id") == "text"
    # Whoever gets the URL sees it, but can not go on with it.
    other = new_page(page.url)
    ended(other, 1)
    assert "You shout LESS!" in text_of(other, 1, 1)
    expect(other.locator(".turn").first).to_contain_text("begins a new chat")
    say(other, "new", turn=2)
    assert messages(site) == ["new"]


@needs_browser
def test_a_wrong_option_is_said(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url)
    page.locator("#options summary").click()
    page.fill("#temperature", "9")
    page.locator("#options summary").click()
    before = len(site.talker.bodies)
    page.fill("#text", "hi")
    page.keyboard.press("Enter")
    expect(page.locator("#temperature")).to_be_visible()
    assert len(site.talker.bodies) == before


@needs_browser
def test_right_to_left_reads_right_to_left(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url)
    say(page, "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd")
    letters = page.locator(".turn .t.prompt").evaluate_all(
        "all => all.filter(t => /[\u05d0-\u05ea]/.test(t.textContent))"
        ".map(t => t.getBoundingClientRect().x)"
    )
    assert len(letters) > 1
    assert letters == sorted(letters, reverse=True)


@needs_browser
def test_a_url_that_says_nonsense_is_as_if_it_said_nothing(
    site: Site, new_page: Callable[..., Page]
):
    page = new_page(
        site.url + "#pin=zz&card=foo&sort=bogus&turn=~&watch=&colour=1&token=@&dense=no"
    )
    say(page, "hi")
    assert page.locator("#sort").input_value() == "surprise"
    expect(page.locator("#pins .row")).to_have_count(0)
    expect(page.locator("#card")).not_to_be_visible()
    page.goto(site.url + "#pin=12:3&pin=12:3&layer=99")
    page.reload()
    expect(page.locator("#pins .row")).to_have_count(1)
    expect(page.locator("#pins .row")).to_contain_text("rivers and lakes 3")  # told by no token yet
    expect(page.locator("#layer")).to_have_value("12")
    page.fill("#query", "99999999")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_contain_text("layer 12 has 0 to 16383")


@needs_browser
def test_what_comes_while_paused_is_counted(site: Site, new_page: Callable[..., Page]):
    site.engine.run("chatcmpl-before", [1], [3])
    site.side.wait_done("chatcmpl-before")
    page = new_page(site.url)
    expect(page.locator(".turn", has_text="chatcmpl-before")).to_be_visible()
    expect(page.locator("#state")).to_have_text("live")
    page.click("#pause")
    for n in range(103):
        site.engine.run(f"chatcmpl-many-{n}", [1], [3])
        if n % 10 == 2:  # faster than that, and its socket would drop some
            site.side.wait_done(f"chatcmpl-many-{n}")
    expect(page.locator("#pause")).to_have_text("Resume (100 new)")
    page.click("#pause")
    expect(page.locator(".turn")).to_have_count(100)
    expect(page.locator(".turn", has_text="chatcmpl-many-102 ")).to_be_visible()
    expect(page.locator("#notices")).to_contain_text("3 requests that came while")


@needs_browser
def test_questions_of_the_page_are_nobodys_requests(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url)
    page.fill("#query", "a river")
    page.get_by_role("button", name="What fires on it?").click()
    expect(page.locator("#found h2")).to_have_text("Fires on “a river”")
    page.reload()
    expect(page.locator("#found h2")).to_have_text("Fires on “a river”")
    assert page.locator(".turn", has_text="page-try").count() == 0


@needs_browser
def test_an_unknown_request_is_waited_for(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url)
    say(page, "hi")
    page.goto(site.url + "#watch=chatcmpl-comes-later")
    turn = page.locator(".turn", has_text="chatcmpl-comes-later")
    expect(turn).to_contain_text("Nothing was heard of it yet")
    site.engine.run("chatcmpl-comes-later", [1, 2], [3, 4])
    expect(turn.locator(".t")).to_have_count(4)
    expect(turn.locator(".plain")).not_to_be_visible()


@needs_browser
def test_a_thumb_finds_the_features(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url, viewport={"width": 360, "height": 700}, has_touch=True)
    say(page, "hello")
    tokens(page).nth(3).tap()
    expect(page.locator("#token-features .row").first).to_be_in_viewport()
    page.locator("#unpin").tap()
    expect(page.locator("#token-features .row").first).not_to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_keys_take_the_pin_along_and_open_the_card(site: Site, new_page: Callable[..., Page]):
    page = new_page(site.url + "#watch=mine")
    say(page, "hello")
    tokens(page).nth(3).click()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#which")).to_contain_text("at 4, ")
    expect(page.locator("#which")).to_contain_text("(pinned)")
    assert page.url.endswith("%404")
    expect(page.locator("#said")).to_contain_text(": ")
    page.keyboard.press("c")
    expect(page.locator("#card")).to_be_visible()
    assert names(page)
