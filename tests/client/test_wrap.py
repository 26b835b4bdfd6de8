"""OpenAI's own client, wrapped: which tokens a chunk gets, whatever its cut; and what becomes of
an answer whose features do not come. Real answers of vLLM are in tests/vllm/test_client.py."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import openai
import pytest

from neuroscope_vllm import AsyncClient, Client
from neuroscope_vllm.client import alignment, features_of, wrap
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.events import TokenEvent
from neuroscope_vllm.engine.fake import FakeEngine, Script
from tests.client import speaker as speakers
from tests.client.speaker import Said, speaker
from tests.server.side import Side, make_tokenizer

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ROLE: Said = (0, {"role": "assistant", "content": ""}, None)


def ids(text: str) -> list[int]:
    return make_tokenizer().encode(text).ids


def content(*texts: str, index: int = 0) -> list[Said]:
    """The last one ends the answer."""
    last = len(texts) - 1
    return [
        (index, {"content": text}, "length" if at == last else None)
        for at, text in enumerate(texts)
    ]


def streamed(client: Client, name: str, said: list[Said]) -> list[Any]:
    with speaker(name, said) as url, openai.OpenAI(base_url=url, api_key="x") as plain:
        return list(client.wrap(plain).chat.completions.create(**ASK, stream=True))


def texts(events: Iterable[TokenEvent] | None) -> str:
    assert events is not None
    return "".join(event.token for event in events)


@pytest.mark.parametrize(
    ("name", "chunks", "expected"),
    [
        ("letters", [*"abc"], [*"abc"]),
        ("several-tokens-a-chunk", ["ab", "c"], ["ab", "c"]),
        ("four-tokens-a-character", ["a", "", "", "", "🌊b", ""], ["a", "", "", "", "🌊b", ""]),
        ("the-end-comes-alone", ["ab", ""], ["ab", ""]),
        ("all-at-once", ["ab🌊"], ["ab🌊"]),
    ],
)
def test_a_chunk_gets_the_tokens_it_is_made_of(
    client: Client, engine: FakeEngine, name: str, chunks: list[str], expected: list[str]
):
    engine.run(name, ids("hello"), ids("".join(chunks)))
    got = streamed(client, name, [ROLE, *content(*chunks)])
    assert [texts(features_of(one)) for one in got] == ["", *expected, ""]
    told = [event for one in got for event in one.features]
    assert [event.token_id for event in told] == ids("".join(chunks))
    assert "features" not in got[1].model_dump()
    assert got[1].model_dump_json()


def test_the_token_that_is_no_text_comes_with_the_end(client: Client, engine: FakeEngine):
    eos = make_tokenizer().token_to_id("<eos>")
    engine.run("eos", ids("hello"), [*ids("ab"), eos], Script(finish_reason="stop"))
    got = streamed(client, "eos", content("a", "b", ""))
    assert [[event.token_id for event in one.features] for one in got] == [
        ids("a"), ids("b"), [eos], [],
    ]  # fmt: skip


def test_choices_are_told_apart(client: Client, engine: FakeEngine):
    engine.run("two", ids("hello"), ids("first"))
    engine.run("two", ids("hello"), ids("2nd"), Script(choice=1))
    first, second = content("fi", "rst"), content("2", "nd", index=1)
    got = streamed(client, "two", [first[0], second[0], second[1], first[1]])
    assert [texts(one.features) for one in got] == ["fi", "2", "nd", "rst", ""]
    assert [{event.choice for event in one.features} for one in got[:-1]] == [{0}, {1}, {1}, {0}]


def test_a_cut_within_a_token_leaves_it_to_the_chunk_that_ends_it(
    client: Client, engine: FakeEngine, new_side: Callable[..., Side]
):
    """Without a tokenizer a token's text is `<id>`, three characters."""
    side = new_side()
    with FakeEngine(side.endpoint) as other, Client(side.base) as theirs:
        side.wait_armed()
        other.run("cut", [1], [3, 4, 5])
        got = streamed(theirs, "cut", content("<3", "><4", ">", "<5>"))
    assert [texts(one.features) for one in got] == ["", "<3>", "<4>", "<5>", ""]


def test_a_text_that_vllms_parsers_changed_loses_no_token_and_does_not_wait(
    client: Client, engine: FakeEngine
):
    engine.run("parsed", ids("hello"), ids("<think>so</think>yes"))
    deltas = [{"reasoning": "so"}, {"content": "yes"}, {"content": ""}]
    said: list[Said] = [(0, delta, None) for delta in deltas[:-1]]
    got = streamed(client, "parsed", [*said, (0, deltas[-1], "stop")])
    assert texts(event for one in got for event in one.features) == "<think>so</think>yes"


@pytest.mark.parametrize(
    ("name", "deltas"),
    [
        ("tool", [{"content": "so "}, {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}]),
        ("thought", [{"reasoning_content": "so "}, {"content": "f(1)"}]),
    ],
)
def test_what_a_parser_took_out_of_the_text_keeps_its_tokens(
    client: Client, engine: FakeEngine, name: str, deltas: list[dict[str, Any]]
):
    engine.run(name, ids("hello"), ids("so <call>f(1)</call>"))
    said: list[Said] = [*((0, delta, None) for delta in deltas), (0, {}, "tool_calls")]
    got = streamed(client, name, said)
    assert texts(event for one in got for event in one.features) == "so <call>f(1)</call>"


def test_an_echoed_prompt_has_no_tokens_of_the_answer(client: Client, engine: FakeEngine):
    engine.run("echo", ids("hello "), ids("there"))
    said = content("hello th", "er", "e")
    with speaker("echo", said) as url, openai.OpenAI(base_url=url, api_key="x") as plain:
        ask = client.wrap(plain).completions.create
        got = list(ask(model="m", prompt="hello ", echo=True, stream=True))
    assert "".join(texts(features_of(one)) for one in got) == "there"


def test_each_observed_layer_has_its_event(new_side: Callable[..., Side], tokenizer_file: Path):
    side = new_side(tokenizer_file=tokenizer_file)
    with FakeEngine(side.endpoint, layers=(3, 20)) as engine, Client(side.base) as client:
        side.wait_armed()
        engine.run("layers", ids("hello"), ids("ab"))
        got = streamed(client, "layers", content("a", "b"))
    for one in got[:-1]:
        assert [event.layer for event in one.features] == [3, 20]


def test_a_whole_answer(client: Client, engine: FakeEngine):
    engine.run("whole-chat", ids("hello"), ids("ab🌊"))
    said = content("ab🌊")
    with speaker("whole-chat", said) as url, openai.OpenAI(base_url=url, api_key="x") as plain:
        wrapped = client.wrap(plain)
        answer = wrapped.chat.completions.create(**ASK)
        assert texts(features_of(answer)) == answer.choices[0].message.content
        assert not hasattr(plain.chat.completions.create(**ASK), "features")
        raw = wrapped.chat.completions.with_raw_response.create(**ASK)
        assert raw.headers["content-type"] == "application/json"


def test_every_way_to_ask_and_every_copy(client: Client, engine: FakeEngine):
    def run() -> None:
        engine.run("ways", ids("hello"), ids("ab"))

    said: list[Said] = [ROLE, (0, {"content": "ab"}, None), (0, {}, "stop")]
    with speaker("ways", said) as url, openai.OpenAI(base_url=url, api_key="x") as plain:
        wrapped = client.wrap(plain)
        again = wrapped.with_options(timeout=30).copy(max_retries=0)
        assert (again.timeout, again.max_retries) == (30, 0)
        engine.run("ways", ids("hello"), ids("ab"))
        assert texts(features_of(client.wrap(wrapped).chat.completions.create(**ASK))) == "ab"
        wrapped.chat.completions.create(**ASK)
        for one in (wrapped, again):
            for completions in (one.chat.completions, one.beta.chat.completions):
                run()
                assert texts(features_of(completions.create(**ASK))) == "ab"
                run()
                assert texts(features_of(completions.parse(**ASK))) == "ab"
                run()
                with completions.stream(**ASK) as events:
                    chunks = [event.chunk for event in events if event.type == "chunk"]
                assert [texts(features_of(chunk)) for chunk in chunks] == ["", "ab", "", ""]


def test_the_async_twin(side: Side, engine: FakeEngine):
    def run() -> None:
        engine.run("async-chat", ids("hello"), ids("ab🌊c"))

    async def chat(url: str) -> None:
        async with (
            AsyncClient(side.base) as client,
            openai.AsyncOpenAI(base_url=url, api_key="x") as plain,
        ):
            wrapped = client.wrap(plain)
            run()
            chunks = [c async for c in await wrapped.chat.completions.create(**ASK, stream=True)]
            assert [texts(features_of(one)) for one in chunks] == ["a", "b🌊", "c", ""]
            run()
            async with await wrapped.chat.completions.create(**ASK, stream=True) as stream:
                assert texts(features_of(await anext(stream))) == "a"
            run()
            answer = await wrapped.chat.completions.create(**ASK)
            assert texts(features_of(answer)) == "ab🌊c"

    with speaker("async-chat", content("a", "b🌊", "c")) as url:
        asyncio.run(chat(url))


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_does_not_fail_for_want_of_features(
    stream: bool, caplog: pytest.LogCaptureFixture
):
    with (
        speaker("lonely", content("a", "b")) as url,
        openai.OpenAI(base_url=url, api_key="x") as plain,
        Client("http://127.0.0.1:9") as client,
        caplog.at_level(logging.WARNING),
    ):
        answer = client.wrap(plain).chat.completions.create(**ASK, stream=stream)
        for one in answer if stream else [answer]:
            assert features_of(one) is None or not one.choices
    assert "comes without features: no feature stream answers" in caplog.text


def test_features_that_do_not_come_are_not_waited_for_for_ever(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("neuroscope_vllm.client.wrap.WAIT_S", 0.3)
    got = streamed(client, "of-another-server", content("a", "b"))
    assert [one.features for one in got] == [None, None, None]


def test_the_reading_thread_ends_with_its_client(side: Side, engine: FakeEngine):
    engine.run("ending", ids("hello"), ids("abc"))
    with Client(side.base) as client:
        with (
            speaker("ending", content("a", "b", "c")) as url,
            openai.OpenAI(base_url=url, api_key="x") as plain,
            client.wrap(plain).chat.completions.create(**ASK, stream=True) as stream,
        ):
            next(stream)
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("neuroscope-features") == 1
    for thread in threading.enumerate():
        if thread.name == "neuroscope-features":
            thread.join(5)
            assert not thread.is_alive()


def test_the_wrong_kind_of_client_is_refused(client: Client):
    wrong: Any = openai.AsyncOpenAI(base_url="http://127.0.0.1:9", api_key="x")
    with pytest.raises(ConfigError, match=r"takes openai.OpenAI, and was given AsyncOpenAI"):
        client.wrap(wrong)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_outlives_the_client_that_was_closed(
    client: Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture, stream: bool
):
    engine.run("outlived", ids("hello"), ids("ab"))
    with speaker("outlived", content("a", "b")) as url:
        with openai.OpenAI(base_url=url, api_key="x") as plain, Client(client.url) as ours:
            wrapped = ours.wrap(plain)
            list(wrapped.chat.completions.create(**ASK, stream=True))
        ours.close()  # twice does no harm
        wrapped = ours.wrap(openai.OpenAI(base_url=url, api_key="x"))
        answer: Any = wrapped.chat.completions.create(**ASK, stream=stream)
        for one in answer if stream else [answer]:
            assert features_of(one) is None
    assert "comes without features: the client of" in caplog.text


def test_an_answer_does_not_wait_for_a_client_that_is_closed(client: Client):
    with (
        speaker("of-nobody", content("a", "b")) as url,
        openai.OpenAI(base_url=url, api_key="x") as plain,
    ):
        ours = Client(client.url)
        threading.Timer(0.5, ours.close).start()
        began = time.monotonic()
        got = list(ours.wrap(plain).chat.completions.create(**ASK, stream=True))
    assert [features_of(one) for one in got] == [None, None, None]
    assert time.monotonic() - began < wrap.WAIT_S / 2


def test_threads_share_one_reader(client: Client, monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []

    def slow(of: Client) -> Any:
        time.sleep(0.1)
        made.append(wrap_background(of))
        return made[-1]

    wrap_background = wrap.Background
    monkeypatch.setattr(wrap, "Background", slow)
    with Client(client.url) as ours:
        threads = [threading.Thread(target=ours.background) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    assert len(made) == 1


ANSWERS = ("first", "other", "third")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_an_id_that_was_used_before(
    client: Client, engine: FakeEngine, stream: bool, late: bool, request: pytest.FixtureRequest
):
    """Each answer has the features of its own request, also where the side process has heard only
    of the earlier ones when the answer comes."""
    name = request.node.name
    wrapped: dict[str, Any] = {}
    for text in ANSWERS:
        run = threading.Timer(0.3 if late else 0.0, engine.run, (name, ids("hello"), ids(text)))
        run.start()
        if not late:
            run.join(5)
        with speaker(name, content(text)) as url:
            plain = wrapped.setdefault(
                "client", client.wrap(openai.OpenAI(api_key="x", base_url=url))
            )
            plain.base_url = url
            answer = plain.chat.completions.create(**ASK, stream=stream)
            got = list(answer) if stream else [answer]
        assert texts(event for one in got for event in one.features) == text
        run.join(5)


def test_requests_of_one_id_at_the_same_time_are_not_taken_for_each_other(
    client: Client, side: Side, engine: FakeEngine, caplog: pytest.LogCaptureFixture
):
    slow = Script(pause_s=0.5)  # all have begun before the first is told any token
    runs = [
        threading.Thread(target=engine.run, args=("at-once", ids("hello"), ids(text), slow))
        for text in ANSWERS
    ]
    for run in runs:
        run.start()
    side.wait_known("at-once", len(ANSWERS))
    got = streamed(client, "at-once", content("first"))
    for run in runs:
        run.join(10)
    assert [one.features for one in got] == [None, None]
    assert "which is its own is not known" in caplog.text


def test_requests_before_the_answer_are_not_its_own(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    """As when another client used the id: vLLM says when the answer began."""
    engine.run("before", ids("hello"), ids("other"))
    now = time.time() + 2 * alignment.CLOCK_S
    monkeypatch.setattr(speakers, "CREATED", int(now))
    monkeypatch.setattr("neuroscope_vllm.client.wrap.WAIT_S", 0.5)
    got = streamed(client, "before", content("first"))
    assert [one.features for one in got] == [None, None]
    with speaker("before", content("first")) as url, openai.OpenAI(base_url=url, api_key="x") as ai:
        assert features_of(client.wrap(ai).chat.completions.create(**ASK)) is None
