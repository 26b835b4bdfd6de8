"""Traces, cards, labels, inspection, steering: the client against a real side process."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from neuroscope_vllm import AsyncClient, Client
from neuroscope_vllm.client import ServerError, Trace
from neuroscope_vllm.core.events import DoneEvent, RequestEvent
from neuroscope_vllm.engine.fake import FakeEngine, Script, features_of
from tests.server.side import Side, make_tokenizer
from tests.support.browser import needs_browser, opened

TEXT = "<script>alert('owned')</script> 🌊"
PROMPT, OUTPUT = (make_tokenizer().encode(text).ids for text in ("a <b>", TEXT))


@pytest.fixture
def trace(client: Client, engine: FakeEngine) -> Trace:
    engine.run("traced", PROMPT, OUTPUT)
    return client.trace("traced")


def test_a_trace_is_all_of_a_request(trace: Trace):
    assert trace.finished
    assert trace.complete
    assert trace.request_id == "traced"
    assert [token.token_id for token in trace.tokens] == [*PROMPT, *OUTPUT]
    assert [token.token_id for token in trace.prompt] == PROMPT
    assert trace.text == TEXT
    assert isinstance(trace.events[0], RequestEvent)
    assert isinstance(trace.events[-1], DoneEvent)


def test_the_top_features(trace: Trace):
    best: dict[int, float] = {}
    context = [*PROMPT, *OUTPUT][:-1]  # the last one does not run
    for position, token in list(enumerate(context))[1:]:  # the first one is a sink
        for index, activation in features_of(token, position, 20, 4):
            if index % 5:  # the others are dense
                best[index] = max(best.get(index, 0.0), activation / 2)
    top = trace.top(5)
    assert [one.score for one in top] == pytest.approx(sorted(best.values())[::-1][:5], rel=1e-6)
    for one in top:
        assert best[one.index] == pytest.approx(one.score, rel=1e-6)
        assert one.layer == 20
    assert len(trace.top(10_000)) == len(best)
    assert trace.top(3, layer=7) == []


def test_choices_of_a_trace(client: Client, engine: FakeEngine):
    engine.run("both", PROMPT, OUTPUT[:2])
    engine.run("both", PROMPT, OUTPUT[2:5], Script(choice=1))
    trace = client.trace("both")
    assert trace.choices == [0, 1]
    assert trace.choice(1).text == TEXT[2:5]
    with pytest.raises(KeyError, match="no choice 2"):
        trace.choice(2)


def test_of_requests_with_one_id_it_is_the_newest(client: Client, engine: FakeEngine):
    first = engine.run("reused", PROMPT, OUTPUT[:2])
    engine.run("reused", PROMPT, OUTPUT[2:4])
    assert client.trace("reused").text == TEXT[2:4]
    assert client.trace(first).text == TEXT[:2]


def test_a_running_request(client: Client, engine: FakeEngine):
    engine.run("running", PROMPT, OUTPUT[:3], Script(finish_reason=None))
    trace = client.trace("running", wait=0.2)
    assert not trace.finished
    assert "running" in repr(trace)
    with pytest.raises(ServerError, match="request 'unknown' is not kept here") as refused:
        client.trace("unknown", wait=0)
    assert refused.value.status == 404


def test_ids_of_any_characters(client: Client, engine: FakeEngine):
    engine.run("a/b c?d#e", PROMPT, OUTPUT)
    assert client.trace("a/b c?d#e").request_id == "a/b c?d#e"


def test_the_page_needs_no_network_and_shows_text_as_text(trace: Trace, tmp_path: Path):
    page = trace.save(tmp_path / "trace.html").read_text()
    assert not re.search(r"(src|href)=|https?://", page.partition('id="data"')[0])
    assert "<script>alert" not in page
    frame = trace._repr_html_()
    assert frame.startswith("<iframe sandbox=")
    assert "<script" not in frame


@needs_browser
def test_a_notebook_shows_the_tokens(trace: Trace, tmp_path: Path):
    """As a notebook does: the frame within a page that has nothing to do with it."""
    notebook = tmp_path / "notebook.html"
    # Without the sandbox, so that the test may look inside.
    frame = trace._repr_html_().replace('sandbox="allow-scripts" ', "")
    notebook.write_text(f"<!doctype html><meta charset=utf-8><p>a cell</p>{frame}")
    (tmp_path / "profile").mkdir()
    with opened(notebook, tmp_path / "profile") as page:
        shown = page.run(
            "[...document.querySelector('iframe').contentDocument.querySelectorAll('.t')]"
            ".map((span) => span.textContent).join('')"
        )
        assert shown.replace("·", "") == "a <b>" + TEXT
        assert page.faults == []
        assert [url for url in page.requests if url.startswith("http")] == []


def test_show_outside_a_notebook_opens_a_page(trace: Trace, monkeypatch: pytest.MonkeyPatch):
    pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", pages.append)
    trace.show()
    path = Path(pages[0].removeprefix("file://"))
    assert path.read_text() == trace.html()
    path.unlink()


def test_labels_are_searched(client: Client, engine: FakeEngine):
    found = client.features.search("capital")
    assert [(label.index, label.layer) for label in found] == [(5, 20), (9, 20)]
    assert [label.text for label in client.features.search(index=7)] == ["rivers and lakes"]
    assert client.features.search(index=7)[0].unreliable
    assert len(client.features.search("capital", limit=1)) == 1
    with pytest.raises(ServerError, match="no labeller 'nobody' here; loaded: test"):
        client.features.search("capital", labeller="nobody")


def test_a_card(client: Client, engine: FakeEngine):
    """The fake SAE lies in no file, so that the card holds what needs none."""
    card = client.features.get(5)
    assert (card.layer, card.index) == (20, 5)
    assert card.label is not None
    assert card.label.text == "capital cities"
    assert card.missing
    assert client.features.get(6, layer=20).label is None
    with pytest.raises(ServerError) as refused:
        client.features.get(10**9)
    assert refused.value.status == 404


def test_steering_what_does_not_run(client: Client, trace: Trace):
    with pytest.raises(ServerError, match="has ended; only one that runs can be steered") as no:
        client.steer("traced", None)
    assert no.value.status == 409
    with pytest.raises(ServerError, match="the body is no steering") as bad:
        client.steer("traced", {"steer": "strongly"})
    assert bad.value.status == 400


def test_inspection_needs_a_model(client: Client, engine: FakeEngine):
    with pytest.raises(ServerError, match="knows no vLLM server to pass requests to") as refused:
        client.inspect("a text")
    assert refused.value.status == 503


def test_describe(client: Client, engine: FakeEngine):
    described = client.describe()
    assert described.model == "fake"
    assert [(site.layer, site.sae["width"]) for site in described.sites] == [(20, 16_384)]


def test_the_async_twin(side: Side, engine: FakeEngine):
    engine.run("async-traced", PROMPT, OUTPUT)

    async def ask() -> None:
        async with AsyncClient(side.base) as client:
            assert (await client.trace("async-traced")).text == TEXT
            assert len(await client.features.search("capital")) == 2
            assert (await client.features.get(5)).index == 5
            for refused in (client.inspect("a text"), client.steer("async-traced", {"steer": []})):
                with pytest.raises(ServerError):
                    await refused

    asyncio.run(ask())


def test_a_request_larger_than_what_is_kept_is_not_complete(
    new_side: Callable[..., Side], tokenizer_file: Path
):
    side = new_side(tokenizer_file=tokenizer_file, settings={"memory_mb": 1})
    with FakeEngine(side.endpoint) as engine, Client(side.base) as client:
        side.wait_armed()
        engine.run("large", PROMPT * 400, OUTPUT)
        trace = client.trace("large")
        assert not trace.complete
        assert json.dumps(trace.html())


def test_an_earlier_request_of_the_id_with_more_choices_is_another(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("neuroscope_vllm.client.trace.APART_S", 0.0)
    old, new = (make_tokenizer().encode(text).ids for text in ("old", "new"))
    for choice in (0, 1):
        engine.run("used-again", PROMPT, old, Script(choice=choice))
    client.trace("used-again")
    between = time.time()
    engine.run("used-again", PROMPT, new)
    trace = client.trace("used-again", since=between)
    assert (trace.choices, trace.text) == ([0], "new")
    assert client.trace("used-again").choices == [0]
    with pytest.raises(ServerError, match="only earlier ones are kept"):
        client.trace("used-again", wait=0, since=time.time())
