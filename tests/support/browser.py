"""A page in a real Chromium, headless, driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and sys.platform == "darwin", reason="no Chromium on this Mac"
)
"""Elsewhere `tests/run.sh` sees to one, and without it the test fails."""
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")


class Page:
    """One open page, and what its console said that is an error."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = os.fdopen(write, "wb", 0), os.fdopen(read, "rb")
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._rest = b""
        self.faults: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while (heard := self._hear()).get("id") != number:
            self._note(heard)
        assert "error" not in heard, heard
        return heard["result"]

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        self._loaded()

    def reload(self) -> None:
        self.call("Page.reload")
        self._loaded()

    def run(self, script: str) -> Any:
        """The value of a script's last expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def _loaded(self) -> None:
        while True:
            self._note(heard := self._hear())
            if heard.get("method") == "Page.loadEventFired":
                return

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._read.read1(1 << 16)  # pyright: ignore[reportAttributeAccessIssue]
            assert part, "Chromium ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, heard: dict[str, Any]) -> None:
        method, params = heard.get("method"), heard.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.faults.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


@contextmanager
def opened(file: Path | str, profile: Path) -> Iterator[Page]:
    """A file or an address in a browser of its own. `profile` is an empty folder."""
    assert CHROMIUM is not None, "no Chromium here; install the package chromium"
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()
    # Chromium speaks on descriptors 3 and 4.
    words = shlex.join([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"])
    child = subprocess.Popen(
        ["bash", "-c", f"exec {words} 3<&{their_read} 4>&{their_write}"],
        pass_fds=(their_read, their_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_read)
    os.close(their_write)
    page = Page(our_write, our_read)
    try:
        page.open(file.as_uri() if isinstance(file, Path) else file)
        yield page
    finally:
        child.terminate()
        child.wait(20)


@contextmanager
def playwright() -> Iterator[Any]:
    """Playwright's browser, which is this machine's Chromium: for pages that are worked with, not
    just looked at."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "no Chromium here; install the package chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
