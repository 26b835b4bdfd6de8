"""The page's card, search, steering and exports, and what axe says."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

from tests.support.browser import needs_browser
from tests.support.page import (
    HOSTILE,
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
    told,
)

__all__ = ["browser", "new_page", "site"]  # fixtures


AXE = Path(__file__).parents[1] / "support/axe/axe.min.js"


def serious(page: Page) -> list[tuple[str, str, list[str]]]:
    """What axe-core calls a serious or critical fault: its rule, impact, and some elements."""
    if not page.evaluate("typeof axe === 'object'"):
        page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    told = [(one["id"], one["impact"], [n["html"] for n in one["nodes"]][:3]) for one in found]
    return [one for one in told if one[1] in ("serious", "critical")]


@needs_browser
def test_a_card_steers_and_both_answers_stand_side_by_side(
    site: Site, new_page: Callable[..., Page]
):
    page = new_page(site.url)
    say(page, "hi")
    page.locator("#ranked .open").first.click()
    form = page.locator("#card form.steer")
    form.locator("input[type=range]").evaluate(
        "e => { e.value = -55; e.dispatchEvent(new Event('input')) }"
    )
    expect(form.locator("output")).to_have_text("-55")
    feature = int(re.findall(r"card=12%3A(\d+)", page.url)[0])
    form.get_by_role("button").click()
    ended(page, 1)
    assert "You said hi." in text_of(page, 1, 0)
    assert "You shout HI!" in text_of(page, 1, 1)
    plain, steered = site.talker.bodies[-2:]
    if "vllm_xargs" in plain:  # both were sent at once
        plain, steered = steered, plain
    assert "vllm_xargs" not in plain
    edit = {"op": "add", "layer": 12, "feature": feature, "value": -55}
    assert json.loads(steered["vllm_xargs"]["neuroscope"]) == {"steer": [edit]}
    assert plain["messages"] == steered["messages"]
    boxes = [page.locator(".pair .answer").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    expect(page.locator(".changes h3")).to_have_text("The answers part at token 5")
    page.reload()
    ended(page, 1)
    assert "You shout HI!" in text_of(page, 1, 1)
    expect(page.locator(".pair h3").nth(1)).to_contain_text(f"add feature {feature}: -55")


@needs_browser
def test_features_are_found_by_label_by_index_and_by_text(
    site: Site, new_page: Callable[..., Page]
):
    page = new_page(site.url)
    expect(page.locator("#model")).to_have_text("fake")
    page.fill("#query", "rivers")
    page.keyboard.press("Enter")
    expect(page.locator("#found .row").first).to_contain_text("rivers and lakes")
    page.reload()
    expect(page.locator("#found .row").first).to_contain_text("rivers and lakes")
    page.fill("#query", "4")  # nobody labelled it
    page.keyboard.press("Enter")
    expect(page.locator("#found .row").first).to_contain_text("unlabelled")
    page.fill("#query", "cats")
    page.click("#fires")
    expect(page.locator("#found h2")).to_have_text("Fires on “cats”")
    shown = [
        int(re.findall(r"feature (\d+)", text)[0])
        for text in page.locator("#found small").all_inner_texts()
    ]
    sent = site.talker.bodies[-1]
    assert (sent["prompt"], sent["max_tokens"]) == ("cats", 1)
    latest = site.side.get("/v1/requests").json()["data"][0]["request_id"]
    known = [e for e in told(site, latest) if e["event"] == "prompt"]
    assert set(shown) == {
        f["index"] for e in known for f in e["top_features"] if not f.get("dense")
    }


CARD = {
    "layer": 12, "index": 7, "width": 16384, "sae": "demo", "density": 0.0123, "firings": 412,
    "tokens": 36210, "mean": 3.1, "max": 22.3, "dense": False, "neuronpedia": None, "missing": {},
    "label": {"text": "cats", "labeller": "me", "method": "exemplars", "model": "m", "score": 0.91},
    "labels": [], "histogram": {"edges": [1, 2, 4, 8, 16], "counts": [0, 30, 9, 2]},
    "examples": {"top": [{"activation": 22.3, "tokens": ["The", HOSTILE], "activations": [0, 22.3],
                          "at": 1}],
                 "quantiles": [{"from": 2, "to": 4, "examples": [
                     {"activation": 3, "tokens": ["a", " cat"], "activations": [1, 3], "at": 1}]}]},
    "promoted": [{"token_id": 5, "token": " cat", "logit": 1.5}],
    "suppressed": [{"token_id": 6, "token": "<b>dog", "logit": -0.5}],
    "neighbours": [{"index": 8, "label": "kittens", "unreliable": True, "cosine": 0.81}],
}  # fmt: skip


@needs_browser
def test_the_card_shows_all_there_is(site: Site, new_page: Callable[..., Page]):
    page = new_page("about:blank", REFUSED)
    links = {"neuronpedia": "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/7"}
    page.route("**/v1/features/7?**", lambda route: route.fulfill(json=CARD | links))
    page.goto(site.url + "#card=12:7")
    card = page.locator("#card")
    expect(card.locator("h2")).to_have_text("cats")
    for text in ("score 0.91", "method exemplars", "1.23 % of tokens (412 of 36210)", "mean 3.1",
                 "+1.5", "<b>dog -0.5", "kittens ?", "cosine 0.81"):  # fmt: skip
        expect(card).to_contain_text(text)
    expect(card.locator("svg rect")).to_have_count(3)
    expect(card.locator(".example mark").first).to_have_text(HOSTILE)
    expect(card.get_by_role("link", name="Neuronpedia")).to_have_attribute(
        "href", links["neuronpedia"]
    )
    card.locator("form.try textarea").fill("cats")
    card.get_by_role("button", name="Try", exact=True).click()
    expect(card.locator("form.try ol")).to_contain_text("It fires on none")
    # A server that does not steer knows the strongest alone.
    refusal = {"error": {"message": "this server does not steer"}}
    asked = "**/v1/completions"
    page.route(asked, lambda route: route.fulfill(status=400, json=refusal), times=1)
    card.get_by_role("button", name="Try", exact=True).click()
    expect(card.locator("form.try ol")).to_contain_text("not among the strongest")
    page.unroute("**/v1/features/7?**")
    card.locator(".row .open").click()
    expect(card.locator("header p")).to_have_text("feature 8 of layer 12")
    page.go_back()
    expect(card.locator("header p")).to_have_text("feature 7 of layer 12")
    page.keyboard.press("Escape")
    expect(card).not_to_be_visible()
    assert "card=" not in page.url
    page.close()


@needs_browser
def test_a_request_is_taken_along(site: Site, new_page: Callable[..., Page], tmp_path: Path):
    page = new_page(site.url, permissions=["clipboard-read", "clipboard-write"])
    say(page, "it's <b>")
    count = len(told(site, names(page)[0]))
    menu = page.locator(".turn .menu")
    menu.locator("summary").click()
    menu.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#state")).to_have_text("copied as curl")
    command = page.evaluate("navigator.clipboard.readText()").rpartition("\n")[0]
    subprocess.run(["bash", "-c", command + " -sS"], check=True, timeout=20, capture_output=True)
    assert site.talker.bodies[-1] == site.talker.bodies[-2]
    expect(menu.locator("div")).not_to_be_visible()
    menu.locator("summary").click()
    menu.get_by_role("button", name="Copy as Python").click()
    expect(page.locator("#state")).to_have_text("copied as Python")
    compile(page.evaluate("navigator.clipboard.readText()"), "copied", "exec")
    menu.locator("summary").click()
    with page.expect_download() as got:
        menu.get_by_role("button", name="JSON").click()
    kept = json.loads(Path(got.value.path()).read_text())["choices"]
    known = site.side.wait_done(names(page)[0])  # ours alone: curl's has a name of its own
    assert [one["events"] for one in kept] == [one["events"] for one in known]
    menu.locator("summary").click()
    with page.expect_download() as got:
        menu.get_by_role("link", name="Page").click()
    got.value.save_as(tmp_path / "trace.html")
    alone = new_page((tmp_path / "trace.html").as_uri(), bypass_csp=True)
    asked: list[str] = []
    alone.on("request", lambda request: asked.append(request.url))
    alone.reload()
    assert alone.locator(".t").count() == count
    assert all(url.startswith("file:") for url in asked)
    assert serious(alone) == []


@needs_browser
@pytest.mark.parametrize(
    "media",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"forced_colors": "active"}],
    ids=["light", "dark", "forced"],
)
def test_axe_finds_nothing_serious(
    site: Site, new_page: Callable[..., Page], media: dict[str, Any]
):
    page = new_page(site.url, bypass_csp=True, **media)
    page.route("**/v1/features/7?**", lambda route: route.fulfill(json=CARD))
    say(page, "What is gravity? 0123456789")
    tokens(page).nth(8).click()
    page.locator("#ranked .feature").first.click()
    page.select_option("#colour", "")

    assert len(set(page.locator("#turns .t").evaluate_all("a => a.map(t => t.dataset.level)"))) > 5
    assert serious(page) == []
    page.locator(".menu summary").click()
    page.fill("#query", "rivers")
    page.keyboard.press("Enter")
    expect(page.locator("#found .row").first).to_be_visible()
    page.click("#as-table")
    assert serious(page) == []
    page.set_viewport_size({"width": 320, "height": 640})
    assert serious(page) == []
    page.click("#as-table")
    tokens(page).filter(has_text="⏎").first.click()  # a button without a letter
    assert serious(page) == []
    page.evaluate("location.hash += '&card=12:7'")
    expect(page.locator("#card .weights .row")).to_be_visible()
    assert serious(page) == []
