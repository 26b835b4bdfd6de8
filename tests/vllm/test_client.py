"""The client, `neuroscope watch` and the examples against the demo that vLLM serves."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from neuroscope_vllm import AsyncClient, Client
from neuroscope_vllm.cli.demo import NAME, demo_model, demo_sae
from neuroscope_vllm.client import features_of
from neuroscope_vllm.core.events import DoneEvent, GapEvent, RequestEvent, SteeringEvent, TokenEvent
from tests.support.served import Served, start_neuroscope

EXAMPLES = Path(__file__).parents[2] / "examples"
FLAGS = ("--served-model-name", NAME, "--max-model-len", "1024", "--enforce-eager")
LAYER, CAUSE = 20, 6091
QUESTION = "What is gravity?"
TOKENS = 200
"""So many take longer than a side process that is started again."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("client") / "serve.log"
    served = start_neuroscope(demo_model(), demo_sae(), log, vllm_flags=FLAGS)
    try:
        yield served.wait_ready()
    finally:
        served.stop()


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.features) as client:
        yield client


@pytest.fixture
def plain(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.chat}/v1", api_key="none") as plain:
        yield plain


def chat(question: str = QUESTION, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": NAME, "messages": messages, "max_tokens": 40, "temperature": 0, **more}


def texts(events: Iterable[TokenEvent] | None, choice: int = 0) -> str:
    assert events is not None
    return "".join(event.token for event in events if event.choice == choice)


CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "n": {"n": 3, "temperature": 1.0},
    "stop": {"stop": ["physics", "curv"]},
    "stop in the middle of a token": {"stop": ["undamental c"]},
    "emoji": {"question": "Repeat: 🌊🏔️🦉 日本語 ñandú", "max_tokens": 30},
    "usage": {"stream_options": {"include_usage": True}},
    "tokens of their own": {"logprobs": True, "top_logprobs": 2},
}


@pytest.mark.parametrize("kind", CHATS)
def test_chunk_text_is_the_text_of_its_tokens(client: Client, plain: openai.OpenAI, kind: str):
    wrapped = client.wrap(plain)
    said: dict[int, str] = {}
    told: dict[int, list[TokenEvent]] = {}
    held_back = "stop" in kind  # vLLM cuts by characters there
    for chunk in wrapped.chat.completions.create(**chat(**CHATS[kind]), stream=True):
        features = features_of(chunk)
        assert features is not None
        for one in chunk.choices:
            text = one.delta.content or ""
            assert held_back or text == texts(features, one.index)
            said[one.index] = said.get(one.index, "") + text
            mine = [event for event in features if event.choice == one.index]
            told.setdefault(one.index, []).extend(mine)
    assert sorted(said) == list(range(CHATS[kind].get("n", 1)))
    for index, events in told.items():
        assert said[index] == texts(events, index)
        assert [event.token_index for event in events] == list(range(len(events)))
        # Each ran through the model but for the last.
        assert all(event.features_at == "self" for event in events[:-1])
        assert all(event.top_features for event in events[:-1])


@pytest.mark.parametrize("kind", [kind for kind in CHATS if kind != "usage"])
def test_a_whole_answer_has_all_its_tokens(client: Client, plain: openai.OpenAI, kind: str):
    answer = client.wrap(plain).chat.completions.create(**chat(**CHATS[kind]))
    for one in answer.choices:
        assert texts(features_of(answer), one.index) == one.message.content


@pytest.mark.parametrize("stream", [True, False])
def test_an_id_for_all_requests_of_a_conversation(
    client: Client, plain: openai.OpenAI, stream: bool
):
    wrapped = client.wrap(plain.with_options(default_headers={"X-Request-Id": f"talk-{stream}"}))
    for question in ("What is gravity?", "Name a colour.", "What is a river?"):
        answer: Any = wrapped.chat.completions.create(
            **chat(question=question, max_tokens=6), stream=stream
        )
        for one in answer if stream else [answer]:
            said = one.choices[0].delta if stream else one.choices[0].message
            assert texts(features_of(one)) == (said.content or "")


def test_text_completions_of_several_prompts(client: Client, plain: openai.OpenAI):
    ask: dict[str, Any] = {"model": NAME, "prompt": ["The sky is", "Rivers"], "max_tokens": 8}
    wrapped = client.wrap(plain)
    for chunk in wrapped.completions.create(**ask, stream=True):
        [one] = chunk.choices
        assert texts(features_of(chunk), one.index) == one.text
    answer = wrapped.completions.create(**ask)
    assert [texts(features_of(answer), one.index) for one in answer.choices] == [
        one.text for one in answer.choices
    ]


def test_the_async_twin(server: Served):
    async def ask() -> None:
        async with (
            AsyncClient(server.features) as client,
            openai.AsyncOpenAI(base_url=f"{server.chat}/v1", api_key="none") as plain,
        ):
            wrapped = client.wrap(plain)

            async def one(question: str) -> None:
                async for chunk in await wrapped.chat.completions.create(
                    **chat(question), stream=True
                ):
                    text = chunk.choices[0].delta.content or ""
                    assert texts(features_of(chunk)) == text
                answer = await wrapped.chat.completions.create(**chat(question))
                assert texts(features_of(answer)) == answer.choices[0].message.content

            await asyncio.gather(*(one(f"{QUESTION} {number}") for number in range(4)))

    asyncio.run(ask())


def test_inspection_steering_and_cards(client: Client, plain: openai.OpenAI):
    trace = client.inspect("It was caused by the rain.")
    assert "".join(token.token for token in trace.tokens) == "It was caused by the rain."
    assert CAUSE in [feature.index for feature in trace.top(20)]
    assert client.inspect("Hello", chat=True).text == ""
    assert any(token.token == "Hello" for token in client.inspect("Hello", chat=True).prompt)

    card = client.features.get(CAUSE)
    assert card.label is not None
    assert "cause" in card.label.text
    assert card.histogram is not None
    assert card.promoted
    assert CAUSE in [label.index for label in client.features.search("cause")]

    events: list[Any] = []
    changed: list[Any] = []
    spec = {"steer": [{"op": "add", "layer": LAYER, "feature": CAUSE, "value": 5}]}
    for chunk in client.wrap(plain).chat.completions.create(
        **chat(max_tokens=80, extra_body={"min_tokens": 80}), stream=True
    ):
        if not changed:
            changed.append(client.steer(chunk.id, spec))
            events = [chunk.id]
    [choice] = changed[0].choices
    assert choice.error is None
    told = client.trace(events[0])
    [steering] = [event for event in told.events if isinstance(event, SteeringEvent)]
    assert steering.position == choice.position
    assert any(token.steered for token in told.answer)


def test_a_chat_goes_on_while_the_side_process_is_started_again(
    server: Served, client: Client, plain: openai.OpenAI
):
    """Every chunk has its tokens, each token comes once, and those of the pause may lack
    features."""
    everything: list[Any] = []

    def read() -> None:
        for event in client.stream():
            everything.append(event)
            # Others that ended shortly before the restart are told again.
            if isinstance(event, DoneEvent) and event.completion_tokens == TOKENS:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    wait_for_reader(server)
    ask = chat(max_tokens=TOKENS, extra_body={"min_tokens": TOKENS})
    told: list[TokenEvent] = []
    for number, chunk in enumerate(client.wrap(plain).chat.completions.create(**ask, stream=True)):
        if number == 20:
            os.kill(_side_process(server), signal.SIGKILL)
        features = features_of(chunk)
        assert features is not None, number
        assert texts(features) == (chunk.choices[0].delta.content or "")
        told += features
    assert [event.token_index for event in told] == list(range(TOKENS))
    known = [event.features_at is not None for event in told]
    assert all(known[:15])
    assert any(known[20:])  # it is watched again before its end
    # The reader of all saw the same, and was told of the restart once.
    reader.join(10)
    assert not reader.is_alive()
    name = told[0].internal_id
    mine = [e for e in everything if getattr(e, "internal_id", None) == name]
    assert [e.token_index for e in mine if isinstance(e, TokenEvent) and e.phase is None] == list(
        range(TOKENS)
    )
    assert sum(isinstance(event, RequestEvent) for event in mine) == 1
    gaps = [event for event in everything if isinstance(event, GapEvent)]
    assert [gap.reason for gap in gaps].count("restarted") == 1


def wait_for_reader(server: Served) -> None:
    """Until somebody reads the stream."""
    deadline = time.monotonic() + 30
    describe = f"{server.features}/v1/features/describe"
    while not httpx.get(describe).json()["limits"]["readers"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _side_process(server: Served) -> int:
    """Its pid: the descendant of the server that runs our server module."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(pid)
    line = [server.process.pid]
    for pid in line:
        line += children.get(pid, [])
    [found] = [
        pid
        for pid in line
        if b"neuroscope_vllm.server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def test_watching_from_the_terminal(server: Served, client: Client, plain: openai.OpenAI):
    answer = client.wrap(plain).chat.completions.create(**chat())
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "watch", "--url", server.features]
    done = subprocess.run(
        [*words, "--request", answer.id],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "80"},
    )
    shown = [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("'")]
    assert "".join(shown)[:30] == (answer.choices[0].message.content or "")[:30]
    assert "“arise”" in done.stdout


def example(name: str, *words: str, **env: str) -> list[str]:
    return run(name, *words, **env).splitlines()


def run(name: str, *words: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_chat_example(server: Served):
    urls = ("--url", f"{server.chat}/v1", "--features-url", server.features)
    lines = example("chat_with_features.py", *urls, "--max-tokens", "10")
    assert len(lines) == 10
    assert all(re.search(r"\d+\.\d", line) for line in lines[:-1])


def test_the_alarm_example(server: Served, plain: openai.OpenAI):
    words = ["feature_alarm.py", str(CAUSE), "--above", "5", "--count", "1"]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / words[0]), *words[1:], "--features-url", server.features],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_reader(server)
        plain.chat.completions.create(**chat())
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert "→ ' caused'" in out
    assert process.returncode == 0


def test_the_analysis_example(server: Served, tmp_path: Path):
    page = tmp_path / "trace.html"
    lines = example(
        "analyse_trace.py",
        FEATURES_URL=server.features,
        PAGE=str(page),
        TEXT="It was caused by the rain.",
    )
    assert any(f"[{CAUSE}]" in line for line in lines)
    assert any(line.startswith("promotes ") for line in lines)
    assert page.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["chat_with_features", "feature_alarm", "analyse_trace"])
def test_examples_are_short(name: str):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80
