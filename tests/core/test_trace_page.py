"""The page of coloured tokens, in a real browser: what it shows, keys, colours, hostile text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from neuroscope_vllm.core.events import Feature
from neuroscope_vllm.core.inspection.page import PageText, trace_page
from neuroscope_vllm.core.inspection.record import Token, Tracked
from tests.support.browser import Page, needs_browser, opened

HOSTILE = "</script><script>window.owned = 1</script><img src=http://192.0.2.1/x onerror=owned=1>"
BIDI = "\u202eevil\u2066"
LAYERS = (3, 20)


def token(position: int, text: str, layer: int, *features: Feature, **more: object) -> Token:
    shown = {"l0": 5, "features_at": "self", **more}
    return Token(
        position=position,
        token=text,
        token_id=100 + position,
        layer=layer,
        top_features=list(features),
        **shown,  # pyright: ignore[reportArgumentType]
    )


def words(layer: int) -> list[Token]:
    """One text of nine tokens. Feature 7 fires on " cat" and " dog", 9 on "The", in layer 20."""
    cat, dog = (
        Feature(7, "animals <b>bold</b>", activation, activation / 2) for activation in (8.0, 4.0)
    )
    the = Feature(9, HOSTILE, 2.0, 1.0, unreliable=True)
    some = (cat, dog, the) if layer == 20 else (Feature(1, "else", 1.0, 1.0),) * 3
    return [
        token(0, "<bos>", layer, special=True, l0=None, features_at=None),
        token(1, "The", layer, some[2]),
        token(2, " cat", layer, some[0], Feature(9, HOSTILE, 1.0, 0.5, unreliable=True)),
        token(3, "\n", layer),
        token(4, "", layer, l0=None, features_at=None),
        token(5, "😀", layer, sink=True),
        token(6, " dog", layer, some[1]),
        token(7, HOSTILE, layer),
        token(8, BIDI, layer),
    ]


def page_of(firings: bool = True) -> str:
    tokens = sorted([t for layer in LAYERS for t in words(layer)], key=lambda t: t.position)
    known = {20: {7: [(2, 8.0), (3, 0.5), (6, 4.0)], 9: [(1, 2.0), (2, 1.0)]}, 3: {1: [(1, 1.0)]}}
    text = PageText(heading=HOSTILE, tokens=tokens, firings=known if firings else None)
    again = PageText(heading="again", tokens=words(20), firings={20: {7: [(2, 16.0)]}})
    return trace_page(f"title {HOSTILE}", ["about", HOSTILE], [text, again])


class Elements(HTMLParser):
    """Names, attributes and the data of scripts, as a parser of HTML sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data


def test_the_data_is_inert_and_nothing_is_loaded() -> None:
    html = page_of()
    parsed = Elements()
    parsed.feed(html)
    names = [name for name, _ in parsed.found]
    assert names.count("script") == 2
    assert {"img", "link", "iframe", "b"}.isdisjoint(names)
    assert not [a for _, attrs in parsed.found for a in attrs if a in ("src", "href", "style")]
    assert not [a for _, attrs in parsed.found for a in attrs if a.startswith("on")]
    data = json.loads(parsed.scripts[0])
    assert data["texts"][0]["tokens"][7][1] == HOSTILE
    assert data["unreliable"] == {"3": [9], "20": [9]}
    policy = next(a["content"] for n, a in parsed.found if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert len(html) < 30_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(page_of(), encoding="utf-8")
    with opened(folder / "page.html", folder / "profile") as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    """The page as it is first opened."""
    browser.resize(1200, 800)
    browser.reload()
    return browser


def levels(page: Page) -> list[float]:
    script = "[...document.querySelectorAll('.t')].map(t => +t.style.getPropertyValue('--a'))"
    return page.run(script)


def text_of(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({selector!r}).innerText")


def focused(page: Page) -> str:
    return page.run("document.activeElement.textContent")


def select_layer_20(page: Page) -> None:
    page.run(
        "{ const s = document.getElementById('layer'); s.value = '20';"
        " s.dispatchEvent(new Event('change')) }"
    )


def click(page: Page, selector: str, number: int = 0) -> None:
    page.run(f"document.querySelectorAll({selector!r})[{number}].click()")


@needs_browser
def test_hostile_text_stays_text(page: Page) -> None:
    assert page.run("window.owned") is None
    assert page.run("document.images.length + document.querySelectorAll('b').length") == 0
    assert text_of(page, "h1") == f"title {HOSTILE}"
    assert text_of(page, "section h2") == HOSTILE
    tokens = page.run("[...document.querySelectorAll('.t')].map(t => t.textContent)")
    assert tokens[:9] == [
        *("<bos>", "The", " cat", "⏎\n", "·", "😀", " dog", HOSTILE, r"\u{202e}evil\u{2066}")
    ]
    assert all(url.startswith("file:") for url in page.requests)
    assert page.faults == []


@needs_browser
def test_tokens_are_coloured_by_their_strongest_feature(page: Page) -> None:
    select_layer_20(page)
    # Scores: "The" 1, " cat" 4, " dog" 2, of at most 4.
    assert levels(page)[:9] == [0, 0.25, 1, 0, 0, 0, 0.5, 0, 0]
    assert text_of(page, "#colour") == "colour: score of the strongest feature"


@needs_browser
def test_a_chosen_feature_colours_all_texts_and_lists_where_it_fires(page: Page) -> None:
    select_layer_20(page)
    click(page, ".t", 2)
    assert text_of(page, "#which") == '" cat" at 2, token 102, layer 20, 5 active features'
    assert "animals <b>bold</b>" in text_of(page, "#features")
    click(page, "#features button")
    # On "\n" too, where it is none of the best; the second text has its maximum.
    assert levels(page)[:9] == [0, 0, 0.5, 0.031, 0, 0, 0.25, 0, 0]
    assert levels(page)[11] == 1
    assert text_of(page, "#colour") == "colour: activation of feature 7, animals <b>bold</b>"
    assert text_of(page, "#firing") == "Feature 7 fires on 4 tokens"
    values = page.run("[...document.querySelectorAll('#places small')].map(s => s.textContent)")
    assert values == ["16", "8", "4", "0.5"]
    click(page, "#places button", 2)
    assert focused(page) == " dog"
    click(page, "#clear")
    assert levels(page)[2] == 1


@needs_browser
def test_unreliable_labels_are_marked(page: Page) -> None:
    select_layer_20(page)
    click(page, ".t", 2)
    assert text_of(page, "#features li").startswith("animals <b>bold</b>\n")
    assert page.run("document.querySelectorAll('#features .doubt').length") == 1
    assert text_of(page, "#features .doubt") == f"{HOSTILE} ?"
    assert "little better than chance" in page.run("document.querySelector('.doubt').title")
    click(page, "#features button", 1)
    assert text_of(page, "#colour").endswith(f"feature 9, {HOSTILE} (unreliable label)")


@needs_browser
def test_tokens_without_features_say_why(page: Page) -> None:
    select_layer_20(page)
    for number, why in ((0, "special token"), (3, "no active"), (4, "lost"), (5, "attention sink")):
        click(page, ".t", number)
        assert why in text_of(page, "#features")


@needs_browser
def test_it_is_used_with_the_keyboard(page: Page) -> None:
    select_layer_20(page)
    page.run("document.querySelector('.t').focus()")
    page.press("ArrowRight", "ArrowRight")
    assert focused(page) == " cat"
    page.press("Enter")
    assert focused(page).startswith("animals")
    page.run("document.activeElement.click()")
    assert focused(page).startswith("animals")
    assert page.run("document.activeElement.ariaPressed") == "true"
    page.press("Escape")
    assert focused(page) == " cat"
    page.press("End")
    assert "evil" in focused(page)
    page.press("Home", "Escape")
    assert focused(page) == "<bos>"
    assert text_of(page, "#colour").endswith("strongest feature")
    # One tab stop a text.
    assert page.run("document.querySelectorAll('.t[tabindex=\"0\"]').length") == 2


@needs_browser
def test_each_layer_is_a_view(page: Page) -> None:
    assert text_of(page, "#layers").startswith("layer")
    assert levels(page)[1] == levels(page)[2] == 1  # layer 3, where all score alike
    select_layer_20(page)
    assert levels(page)[1] == 0.25


@needs_browser
def test_it_fits_320_pixels_and_text_can_be_read_in_the_dark(page: Page) -> None:
    select_layer_20(page)
    page.resize(320, 600)
    assert page.run("document.documentElement.scrollWidth") == 320
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        assert contrast(page, 2) > 4.5, scheme  # the strongest colour
        assert contrast(page, 7) > 4.5, scheme  # none


def contrast(page: Page, number: int) -> float:
    """WCAG's ratio of a token's text to what is behind it."""
    style = f"getComputedStyle(document.querySelectorAll('.t')[{number}])"
    canvas = (
        "(() => { const some = document.createElement('p'); some.style.color = 'Canvas';"
        " document.body.append(some); const { color } = getComputedStyle(some); some.remove();"
        " return color })()"
    )
    behind, *colours = (
        [float(part) for part in re.findall(r"[\d.]+", page.run(script))]
        for script in (canvas, f"{style}.color", f"{style}.backgroundColor")
    )
    front, back = colours
    alpha = back[3] if len(back) > 3 else 1.0
    mixed = [
        alpha * one + (1 - alpha) * other for one, other in zip(back[:3], behind[:3], strict=True)
    ]
    low, high = sorted(map(luminance, (front[:3], mixed)))
    return (high + 0.05) / (low + 0.05)


def luminance(rgb: list[float]) -> float:
    linear = [
        c / 12.92 if (c := value / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for value in rgb
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_browser
def test_of_top_features_only_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page_of(firings=False), encoding="utf-8")
    with opened(tmp_path / "page.html", tmp_path / "profile") as page:
        select_layer_20(page)
        click(page, ".t", 2)
        click(page, "#features button")
        assert text_of(page, "#firing") == "Feature 7 is a top feature of 3 tokens"


def test_a_feature_that_was_asked_for_is_coloured_first() -> None:
    asked = Tracked(layer=20, index=5, label="rare", activations=[0.0] * 9)
    text = PageText(heading="t", tokens=words(20), firings={20: {5: []}}, features=[asked])
    parsed = Elements()
    parsed.feed(trace_page("t", [], [text]))
    data = json.loads(parsed.scripts[0])
    assert data["feature"] == 5
    assert data["labels"]["20"]["5"] == "rare"
