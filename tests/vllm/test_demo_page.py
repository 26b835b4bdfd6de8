"""The live page in a real Chromium against the embedded demo: model, SAE and labels are real."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

from tests.support.browser import needs_browser
from tests.support.page import (
    browser,
    marked,
    names,
    new_page,
    text_of,
    tokens,
)
from tests.support.served import Served, bin_path, free_port, start

__all__ = ["browser", "new_page"]  # fixtures

LAYER, QUESTION = 20, "What is gravity?"
CAUSE = 6091  # cause-: “cause”, “causes”


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port, features_port = free_port(), free_port()
    ports = ["--port", str(port), "--features-port", str(features_port)]
    words = [bin_path("neuroscope"), "demo", *ports, "--", "--enforce-eager"]
    served = start(words, tmp_path_factory.mktemp("demo") / "log", port, features_port)
    try:
        yield served.wait_ready()
    finally:
        served.stop()


def ask(page: Page, text: str, turn: int = 0) -> None:
    page.locator("#options summary").click()
    page.fill("#max-tokens", "24")
    page.fill("#temperature", "0")
    page.locator("#options summary").click()
    page.fill("#text", text)
    page.keyboard.press("Enter")
    done(page, turn)


def done(page: Page, turn: int) -> None:
    expect(page.locator(".turn").nth(turn)).to_have_attribute("aria-busy", "false", timeout=60_000)


def told(demo: Served, name: str) -> list[dict[str, Any]]:
    (choice,) = demo.trace(name)
    return [e for e in choice["events"] if e["event"] in ("prompt", "token")]


@needs_browser
def test_chat_look_pin_and_find_it_again(demo: Served, new_page: Callable[..., Page]):
    page = new_page(f"{demo.features}/")
    expect(page.locator("#model")).to_have_text("smollm2-135m-instruct")
    expect(page.locator("#trust")).to_contain_text(re.compile(r"layer 20: L0 \d+.*% of variance"))
    ask(page, QUESTION)
    (name,) = names(page)
    events = told(demo, name)
    answer = "".join(e["token"] for e in events if e["event"] == "token")
    assert text_of(page) == "".join(e["token"] for e in events)
    assert "gravity" in answer.lower()

    # A token that has a labelled feature which fires on others, too.
    at = next(
        i
        for i, e in reversed(list(enumerate(events)))
        if any(f["label"] and len(places(events, f["index"])) > 1 for f in e["top_features"])
    )
    tokens(page).nth(at).hover()
    expect(page.locator("#which")).to_contain_text(f"token {events[at]['token_id']}")
    shown = page.locator("#token-features .row")
    best = [f for f in events[at]["top_features"] if not f.get("dense")]
    assert shown.count() == len(best)
    for row, feature in zip(shown.all(), best, strict=True):
        expect(row).to_contain_text(f"feature {feature['index']} ")
        expect(row).to_contain_text((feature["label"] or "unlabelled").replace("\n", "⏎"))
    chosen = next(
        i for i, f in enumerate(best) if f["label"] and len(places(events, f["index"])) > 1
    )
    feature = best[chosen]["index"]
    shown.nth(chosen).locator(".feature").hover()
    expect(tokens(page).nth(at)).to_have_class(re.compile(r"\bhit\b"))
    assert marked(page, ".hit") == places(events, feature)
    shown.nth(chosen).locator(".feature").click()
    tokens(page).nth(at).click()
    page.mouse.move(0, 0)
    coloured = marked(page, "[data-level]")
    assert coloured
    assert set(coloured) <= set(places(events, feature))
    page.reload()
    done(page, 0)
    assert text_of(page) == "".join(e["token"] for e in events)
    expect(page.locator("#which")).to_contain_text("(pinned)")
    expect(page.locator("#colour")).to_have_value(f"{LAYER}:{feature}")
    assert marked(page, "[data-level]") == coloured


def places(events: list[dict[str, Any]], feature: int) -> list[int]:
    """Tokens that have a feature among their strongest."""
    return [
        i for i, e in enumerate(events) if any(f["index"] == feature for f in e["top_features"])
    ]


@needs_browser
def test_a_card_of_real_weights_steers(demo: Served, new_page: Callable[..., Page]):
    page = new_page(f"{demo.features}/#watch=mine")
    ask(page, QUESTION)
    page.fill("#query", "causes")
    page.keyboard.press("Enter")
    found = page.locator("#found .row", has_text=f"feature {CAUSE} ")
    found.locator(".open").click()
    card = httpx.get(f"{demo.features}/v1/features/{CAUSE}", timeout=60).json()
    dialog = page.locator("#card")
    expect(dialog.locator("h2")).to_contain_text("cause-: “cause”, “causes”")
    expect(dialog.locator(".weights .row")).to_have_count(len(card["neighbours"]), timeout=60_000)
    for one in card["promoted"][:3] + card["suppressed"][:3]:
        expect(dialog.locator(".logits", has_text=one["token"].strip()).first).to_be_visible()
    expect(dialog.locator(".histogram rect").first).to_be_visible()
    dialog.get_by_label("text to try the feature on").fill("The storm caused the flood.")
    dialog.get_by_role("button", name="Try", exact=True).click()
    expect(dialog.locator(".try mark")).to_have_text(" caused", timeout=60_000)

    dialog.locator(".steer input[type=range]").fill("5")
    dialog.get_by_role("button", name="Answer with and without").click()
    done(page, 1)
    expect(page.locator(".turn").nth(1).locator(".changes .row").first).to_be_visible()
    plain, steered = text_of(page, 1, 0), text_of(page, 1, 1)
    assert plain != steered
    plain_id, steered_id = names(page)[-2:]
    for name, text in ((plain_id, plain), (steered_id, steered)):
        assert text.endswith("".join(e["token"] for e in told(demo, name) if e["event"] == "token"))
    steering = [e for e in told(demo, steered_id) if e.get("steered")]
    assert {e["steered"][0]["index"] for e in steering} == {CAUSE}
    assert not [e for e in told(demo, plain_id) if e.get("steered")]
    # As another browser finds it, which knows no more than its URL.
    other = new_page(page.url)
    done(other, 1)
    assert (text_of(other, 1, 0), text_of(other, 1, 1)) == (plain, steered)
    titles = other.locator(".turn").nth(1).locator(".answer > h3")
    expect(titles.first).to_have_text("without")
    expect(titles.nth(1)).to_contain_text(f"feature {CAUSE}")


@needs_browser
def test_what_is_copied_runs(demo: Served, new_page: Callable[..., Page], tmp_path: Path):
    page = new_page(
        f"{demo.features}/#watch=mine", permissions=["clipboard-read", "clipboard-write"]
    )
    ask(page, 'Say "it\'s" twice.')
    for what, words in (("curl", ["bash"]), ("Python", [sys.executable])):
        page.locator(".turn .menu summary").click()
        page.get_by_role("button", name=f"Copy as {what}").click()
        expect(page.locator("#state")).to_have_text(f"copied as {what}")
        script = tmp_path / what
        script.write_text(page.evaluate("navigator.clipboard.readText()"))
        ran = subprocess.run([*words, script], capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        assert "top_features" in ran.stdout
    page.reload()
    done(page, 0)
    expect(page.locator(".turn .tokens")).to_have_count(1)  # the others have names of their own
