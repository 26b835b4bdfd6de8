"""Take the README's screenshots anew, from a demo that runs.

    neuroscope demo &
    python examples/screenshots/take.py [URL of the feature stream]

Writes page.png, card.png, steered.png and terminal.png beside itself. Needs playwright and a
Chromium of the machine's own (`tests/run.sh` installs the one, `apt install chromium` the other).
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
from playwright.sync_api import Page, expect, sync_playwright
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
QUESTION = "Why did the Roman Empire fall?"
FEATURE, SUGGESTION = "6725", "A touch of magic"  # “magic”
WIDTH, LINES = 100, 34


def main(url: str) -> None:
    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.5)
        request_id = chat(page, url)
        card(page)
        steered(
            browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.5), url
        )
        drawn = browser.new_page(
            viewport={"width": 1280, "height": 1000}
        )  # without our page's policy
        drawn.route("**/*", lambda route: route.abort())  # the SVG names fonts of the network
        drawn.set_content(terminal(url, request_id))
        drawn.locator("svg").screenshot(path=HERE / "terminal.png")
        browser.close()


def chat(page: Page, url: str) -> str:
    """A chat with a token pinned; its request id."""
    page.goto(f"{url}/#watch=mine&find=cause")
    page.locator("#options summary").click()
    page.fill("#max-tokens", "120")
    page.fill("#temperature", "0")
    page.locator("#options summary").click()
    page.fill("#text", QUESTION)
    page.keyboard.press("Enter")
    answered(page, 0)
    page.locator("#found .close").click()
    page.locator(".turn .t:not(.prompt)", has_text="factors").first.click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=HERE / "page.png")
    return re.findall(r"page-[0-9a-f]+", page.url)[0]


def card(page: Page) -> None:
    """What is known of a feature."""
    page.fill("#query", FEATURE)
    page.keyboard.press("Enter")
    page.locator("#found .open").first.click()
    expect(page.locator("#card .weights .row").first).to_be_visible(timeout=60_000)
    page.locator("#card .try textarea").fill("The wizard had a magic wand.")
    page.locator("#card .try button").click()
    expect(page.locator("#card .try mark").first).to_be_visible(timeout=60_000)
    page.set_viewport_size({"width": 1280, "height": 2000})
    page.locator("#card").screenshot(path=HERE / "card.png")
    page.set_viewport_size({"width": 1280, "height": 800})


def steered(page: Page, url: str) -> None:
    """The guide's question that is answered with and without the demo's preset."""
    page.goto(f"{url}/#watch=mine")
    page.get_by_role("button", name=SUGGESTION).click()
    answered(page, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=HERE / "steered.png")


def answered(page: Page, turn: int) -> None:
    done = page.locator(".turn").nth(turn)
    expect(done).to_have_attribute("aria-busy", "false", timeout=120_000)


def terminal(url: str, request_id: str) -> str:
    """What `neuroscope watch` paints into a terminal, as SVG."""
    words = [str(Path(sys.executable).with_name("neuroscope")), "watch", "--request", request_id]
    ours, theirs = pty.openpty()
    size = {"COLUMNS": str(WIDTH), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    child = subprocess.Popen(
        [*words, "--url", url], stdout=theirs, stderr=theirs, env={**os.environ, **size}
    )
    os.close(theirs)
    painted = b""
    while part := read(ours):
        painted += part
    child.wait()
    lines = Text.from_ansi(painted.decode().replace("\r\n", "\n")).split("\n")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(f"[bold]$[/bold] neuroscope watch --request {request_id}")
    for line in lines[:LINES]:
        console.print(line, no_wrap=True, crop=True)
    return console.export_svg(title="neuroscope watch")


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # the other end is closed
        return b""


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8081"
    httpx.get(f"{url}/ready", timeout=10).raise_for_status()
    main(url)
