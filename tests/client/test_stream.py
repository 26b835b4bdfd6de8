"""The client's streams against real side processes, and what becomes of them when one is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from neuroscope_vllm import AsyncClient, Client
from neuroscope_vllm.client import ServerError, calls
from neuroscope_vllm.core import wire
from neuroscope_vllm.core.events import DoneEvent, GapEvent, GoodbyeEvent, RequestEvent, TokenEvent
from neuroscope_vllm.engine.fake import FakeEngine, Ids, Script, features_of, messages
from tests.server.side import Side, make_tokenizer, start_side, wait_until

NewSide = Callable[..., Side]
ANSWER = " runs 🌊 to sea"
PROMPT, OUTPUT = (make_tokenizer().encode(text).ids for text in ("a river", ANSWER))


def test_importing_the_package_imports_nothing_heavy():
    code = "import neuroscope_vllm, sys; n = {'torch', 'vllm', 'httpx', 'msgspec', 'openai'};"
    code += "assert not n & set(sys.modules); neuroscope_vllm.Client;"
    code += "assert not {'torch', 'vllm', 'openai', 'pyarrow', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_request_from_its_begin_to_its_end(client: Client, engine: FakeEngine):
    engine.run("whole", PROMPT, OUTPUT)
    events = list(client.stream("whole"))
    assert isinstance(events[0], RequestEvent)
    assert isinstance(events[-1], DoneEvent)
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [token.token_id for token in tokens] == [*PROMPT, *OUTPUT]
    # Position 0 is an attention sink.
    assert [(f.index, round(f.activation, 3)) for f in tokens[3].top_features] == [
        (index, round(activation, 3)) for index, activation in features_of(PROMPT[3], 3, 20, 4)
    ]
    texts = [token.token for token in tokens if token.phase is None]
    assert "".join(texts) == ANSWER


def test_a_view_is_the_servers(client: Client, engine: FakeEngine):
    engine.run("viewed", PROMPT, OUTPUT)
    events = list(client.stream("viewed", include="token", top_k=2, dense=False))
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert len(tokens) == len(OUTPUT)
    assert max(len(token.top_features) for token in tokens) == 2
    assert not any(feature.dense for token in tokens for feature in token.top_features)


def test_a_request_is_streamed_before_it_is_sent(client: Client, engine: FakeEngine):
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend(client.stream("awaited")))
    reader.start()
    wait_until(lambda: engine is not None and client.describe())
    engine.run("awaited", PROMPT, OUTPUT)
    reader.join(20)
    assert isinstance(seen[-1], DoneEvent)


def test_what_the_server_refuses_is_its_sentence(client: Client, engine: FakeEngine):
    with pytest.raises(ServerError, match=r"top_k is 99 but this server reports \d+") as refused:
        next(client.stream(top_k=99))
    assert (refused.value.status, refused.value.param) == (400, "top_k")
    with pytest.raises(ServerError, match="unknown parameter 'colour'"):
        next(client.stream(colour="red"))
    with pytest.raises(ServerError, match="layer 7 is not observed"):
        next(client.stream(layer=7))


def test_nobody_there_is_one_sentence(tmp_path: Path):
    with Client("http://127.0.0.1:9") as client:
        for ask in (client.describe, lambda: next(client.stream()), lambda: client.trace("x")):
            with pytest.raises(ServerError, match="no feature stream answers at") as refused:
                ask()
            assert refused.value.status is None
            assert "\n" not in str(refused.value)
    with (
        pytest.raises(ServerError, match="no URL of a server"),
        Client("nonsense") as client,
    ):
        client.describe()


def test_a_closed_client_says_so(side: Side):
    client = Client(side.base)
    client.close()
    asks = (client.describe, lambda: next(client.stream()), lambda: client.trace("x"))
    for ask in (*asks, client.background):
        with pytest.raises(ServerError, match=r"was closed; make another"):
            ask()

    async def ask_twin() -> None:
        twin = AsyncClient(side.base)
        await twin.aclose()
        with pytest.raises(ServerError, match="was closed"):
            await twin.describe()
        with pytest.raises(ServerError, match="was closed"):
            await anext(twin.stream())

    asyncio.run(ask_twin())


@pytest.mark.parametrize("name", ["..", "../describe", "a/./b", "\udcff", "no%2Fsuch?x#y", "é 🌊"])
def test_an_id_is_an_id_whatever_it_holds(client: Client, engine: FakeEngine, name: str):
    with pytest.raises(ServerError, match="is not kept here"):
        client.trace(name, wait=0)
    with pytest.raises(ServerError, match="is not known here"):
        client.steer(name, None)


def test_an_id_with_slashes_and_dots_is_found(client: Client, engine: FakeEngine):
    engine.run("a/../b.🌊", PROMPT, OUTPUT)
    assert client.trace("a/../b.🌊").text == ANSWER


def test_what_is_no_text_is_refused_in_a_sentence(client: Client, engine: FakeEngine):
    for ask in (lambda: client.inspect("\ud800"), lambda: next(client.stream("\ud800"))):
        with pytest.raises(ServerError, match=r"no utf-8 \(surrogates not allowed\)"):
            ask()
    with pytest.raises(ServerError, match="a key in ASCII") as refused:
        Client(client.url, api_key="schlüssel")
    assert "schl" not in str(refused.value)


def test_vllms_own_refusals_are_its_sentence():
    """Their code is a number."""
    error = {"message": "max_tokens is too large.", "type": "BadRequestError", "code": 400}
    answer = httpx.Response(
        400, json={"error": error}, request=httpx.Request("POST", "http://127.0.0.1/v1/completions")
    )
    with pytest.raises(ServerError, match=r"^max_tokens is too large\.$") as refused:
        calls.checked(answer)
    assert (refused.value.status, refused.value.code) == (400, None)


def test_what_is_observed_is_asked_until_an_engine_is_there(new_side: NewSide):
    side = new_side()
    with Client(side.base) as client:
        assert client.describe().sites == []
        with FakeEngine(side.endpoint):
            side.wait_armed()
            assert [site.layer for site in client.describe().sites] == [20]


def test_another_server_is_not_taken_for_one(tmp_path: Path):
    words = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    other = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert other.stdout is not None
        port = other.stdout.readline().split("port ")[1].split()[0]
        (tmp_path / "v1" / "features").mkdir(parents=True)
        (tmp_path / "v1" / "features" / "describe").write_text("<p>hello")
        (tmp_path / "v1" / "features" / "stream").write_text("<p>hello")
        with Client(f"http://127.0.0.1:{port}") as client:
            with pytest.raises(ServerError, match="no neuroscope server"):
                client.describe()
            with pytest.raises(ServerError, match="is no neuroscope server"):
                next(client.stream())
            with pytest.raises(
                ServerError, match="give the URL of a neuroscope server's"
            ) as refused:
                client.steer("x", None)
            assert refused.value.status == 501
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def kill(side: Side) -> None:
    """The side process, which its parent starts again."""
    old = side.process.pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: side.process.pid != old)


@contextlib.contextmanager
def reading(events: Iterator[Any]) -> Iterator[list[Any]]:
    """What a stream tells to a thread meanwhile, until it ends or 30 s have passed."""
    seen: list[Any] = []

    def read() -> None:
        for event in events:
            seen.append(event)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield seen
    thread.join(30)
    assert not thread.is_alive()


def test_a_request_goes_on_after_the_side_process_was_killed(
    new_side: NewSide, tokenizer_file: Path
):
    """Nothing comes twice, the text is whole, and what was lost is told."""
    side = new_side(tokenizer_file=tokenizer_file)
    ids = Ids("cut-1", "cut", PROMPT, OUTPUT)
    said = list(messages(ids, Script(), (20,), 4))
    half = len(said) // 2
    with FakeEngine(side.endpoint, layers=(20,), top_k=4) as engine, Client(side.base) as client:
        side.wait_armed()

        def send(some: list[wire.Message]) -> None:
            for message in some:
                to = engine.worker if isinstance(message, wire.StepFeatures) else engine.scheduler
                to.put(message)

        with reading(client.stream("cut")) as seen:
            send(said[:half])
            sampled = [m for m in said[:half] if isinstance(m, wire.TokensSampled)]
            told = len(PROMPT) + len(sampled) - 1
            wait_until(lambda: sum(isinstance(e, TokenEvent) for e in seen) >= told)
            kill(side)
            side.wait_armed()
            # As vLLM's scheduler does when it meets another hub.
            started = next(m for m in said if isinstance(m, wire.RequestStarted))
            so_far = OUTPUT[: len(sampled)]
            live = wire.Live(started, so_far, cached_tokens=0)
            send([wire.Resync("fake", [live])])
            send(said[half:])
    tokens = [event for event in seen if isinstance(event, TokenEvent)]
    assert [token.token_id for token in tokens] == [*PROMPT, *OUTPUT]
    assert [token.position for token in tokens] == list(range(len(PROMPT) + len(OUTPUT)))
    assert "".join(t.token for t in tokens if t.phase is None) == ANSWER
    assert sum(isinstance(event, RequestEvent) for event in seen) == 1
    gaps = [event for event in seen if isinstance(event, GapEvent)]
    assert gaps[0].reason == "restarted"
    # Features are lost only of what was not told before.
    assert all(gap.start is not None and gap.start >= told for gap in gaps[1:])
    assert isinstance(seen[-1], DoneEvent)


def test_the_stream_of_all_goes_on_with_what_comes_next(new_side: NewSide):
    side = new_side()
    with FakeEngine(side.endpoint) as engine, Client(side.base) as client:
        side.wait_armed()
        stream = client.stream()
        seen: list[Any] = []

        def read() -> None:
            for event in stream:
                seen.append(event)
                if getattr(event, "request_id", None) == "after" and isinstance(event, DoneEvent):
                    return

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        wait_until(lambda: _limits(side)["readers"] == 1)
        engine.run("before", PROMPT, OUTPUT)
        wait_until(lambda: any(isinstance(event, DoneEvent) for event in seen))
        kill(side)
        side.wait_armed()
        engine.run("after", PROMPT, OUTPUT)
        thread.join(30)
        assert not thread.is_alive()
    named = [(type(event), getattr(event, "request_id", None)) for event in seen]
    at = next(i for i, event in enumerate(seen) if isinstance(event, GapEvent))
    assert seen[at].reason == "restarted"
    assert {name for _, name in named[:at]} == {"before"}
    assert {name for _, name in named[at + 1 :]} == {"after"}
    assert named[at + 1 :].count((TokenEvent, "after")) == len(PROMPT) + len(OUTPUT)


def _limits(side: Side) -> dict[str, int]:
    return side.get("/v1/features/describe").json()["limits"]


def test_a_request_that_nobody_knows_any_more_ends_with_a_sentence(
    new_side: NewSide, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("neuroscope_vllm.client.sync.RETOLD_S", 0.5)
    side = new_side()
    with FakeEngine(side.endpoint) as engine, Client(side.base) as client:
        side.wait_armed()
        engine.run("gone", PROMPT, OUTPUT, Script(finish_reason=None))
        stream = client.stream("gone")
        assert isinstance(next(stream), RequestEvent)
        kill(side)
        with pytest.raises(ServerError, match="does not know request 'gone'"):
            list(stream)


def test_a_server_that_stays_away_is_given_up(tmp_path: Path):
    directory = tmp_path / "side"
    directory.mkdir()
    side = start_side(directory)
    try:
        with Client(side.base) as client:
            seen: list[Any] = []
            stream = client.stream(patience=1.0)

            def read() -> None:
                try:
                    for event in stream:
                        seen.append(event)
                except ServerError as error:
                    seen.append(error)

            thread = threading.Thread(target=read, daemon=True)
            thread.start()
            wait_until(lambda: _limits(side)["readers"] == 1)
            began = time.monotonic()
            side.process.stop()
            side.process._listener.close()
            thread.join(15)
            assert 1.0 < time.monotonic() - began < 10
    finally:
        side.process.stop()
    assert isinstance(seen[0], GoodbyeEvent)
    assert "did not come back within 1 s" in str(seen[-1])


def test_the_async_twin(new_side: NewSide, tokenizer_file: Path):
    side = new_side(tokenizer_file=tokenizer_file)

    async def watch() -> list[Any]:
        async with AsyncClient(side.base) as client:
            seen = []
            async for event in client.stream():
                seen.append(event)
                if isinstance(event, TokenEvent) and event.position == 1:
                    kill(side)
                    await asyncio.to_thread(side.wait_armed)
                    await asyncio.to_thread(engine.run, "second", PROMPT, OUTPUT)
                if isinstance(event, DoneEvent) and event.request_id == "second":
                    break
            trace = await client.trace("second")
            assert trace.text == ANSWER
            with pytest.raises(ServerError, match="not kept here"):
                await client.trace("unheard", wait=0)
            return seen

    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        runner = threading.Thread(
            target=lambda: (
                wait_until(lambda: _limits(side)["readers"] == 1),
                engine.run("first", PROMPT, OUTPUT, Script(pause_s=0.02)),
            )
        )
        runner.start()
        seen = asyncio.run(watch())
        runner.join(30)
    assert any(isinstance(event, GapEvent) and event.reason == "restarted" for event in seen)
