"""The live page under `neuroscope replay`: ten thousand tokens that were recorded stay usable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

from tests.support.browser import needs_browser
from tests.support.page import browser, new_page, text_of
from tests.support.recorded import replaying, write_recorded

__all__ = ["browser", "new_page"]  # fixtures

TOKENS, PROMPT = 10_000, 9_700  # the answer comes at 50 tokens a second
COUNT = """
  const ask = requestAnimationFrame;
  window.work = [];
  window.requestAnimationFrame = (job) => ask((now) => {
    const start = performance.now(); job(now); work.push(performance.now() - start);
  });
"""
# Until two frames after `act` are painted, and the longest of their jobs; ms.
TIMED = """async (act) => {
  work.length = 0;
  const start = performance.now();
  eval(act);
  for (let n = 0; n < 2; n++) await new Promise((done) => requestAnimationFrame(done));
  return [performance.now() - start, Math.max(...work)];
}"""
OVER = "dispatchEvent(new Event('pointerover', {bubbles: true}))"
ACTS = {
    "hover a token": f"document.querySelectorAll('.t')[5000].{OVER}",
    "hover a feature": f"document.querySelector('#ranked .feature').{OVER}",
    "pin a feature": "document.querySelector('#ranked .feature').click()",
    "hide nothing": "document.querySelector('#dense').click()",
}


@needs_browser
def test_ten_thousand_recorded_tokens_stay_usable(new_page: Callable[..., Page], tmp_path: Path):
    trace = write_recorded(tmp_path / "recording", TOKENS, layers=(12, 20), prompt=PROMPT)
    with replaying(tmp_path / "recording", log=tmp_path / "log") as base:
        page = new_page("about:blank", bypass_csp=True)
        page.add_init_script(COUNT)
        page.goto(base)
        shown = page.locator(".turn .t")
        page.wait_for_function(f"document.querySelectorAll('.t').length >= {PROMPT}")
        came: list[float] = page.evaluate("work.splice(0)")
        expect(shown).to_have_count(TOKENS, timeout=30_000)
        live: list[float] = sorted(page.evaluate("work.splice(0)"))
        acts = {what: page.evaluate(TIMED, act) for what, act in ACTS.items()}
        texts = [event["token"] for event in events_of(base, trace.head.request_id)]
        assert text_of(page).count("thought") == "".join(texts).count("thought")
        devtools = page.context.new_cdp_session(page)
        devtools.send("HeapProfiler.collectGarbage")
        heap = devtools.send("Runtime.getHeapUsage")["usedSize"]
        page.close()  # before the server, whose end would be an error to it
    print(
        f"{TOKENS} tokens, 2 layers. A prompt of {PROMPT}: {len(came)} frames, {sum(came):.0f} ms"
        f" of work in all, longest {max(came):.0f}. 50 tokens a second: {len(live)} frames, median"
        f" {live[len(live) // 2]:.1f} ms, 99 % below {live[len(live) * 99 // 100]:.0f}, longest"
        f" {live[-1]:.0f}. Until painted (longest frame's work): "
        + ", ".join(f"{what} {whole:.0f} ms ({work:.0f})" for what, (whole, work) in acts.items())
        + f". Heap {heap / 2**20:.0f} MB"
    )
    assert max(came) < 500
    assert live[len(live) // 2] < 16
    assert live[len(live) * 99 // 100] < 100
    assert max(whole for whole, _ in acts.values()) < 1000
    assert heap < 60 * 2**20


def events_of(base: str, request_id: str) -> list[dict[str, Any]]:
    """Token events of one layer, as the API tells them."""
    (choice,) = httpx.get(f"{base}/v1/requests/{request_id}").json()["choices"]
    return [e for e in choice["events"] if e["event"] in ("prompt", "token") and e["layer"] == 20]
