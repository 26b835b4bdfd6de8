"""The client of language models against a real HTTP server with every fault in it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from neuroscope_vllm.core.autointerp import llm as client
from neuroscope_vllm.core.autointerp.llm import LLM, Spent, ask_all
from neuroscope_vllm.core.autointerp.lookup import look_up
from neuroscope_vllm.core.autointerp.prices import Price
from neuroscope_vllm.core.autointerp.questions import Answer, Question
from neuroscope_vllm.core.errors import ConfigError
from tests.support.llm_server import PRICE_IN, PRICE_OUT, LLMServer

SCHEMA = {
    "type": "object",
    "properties": {"said": {"type": "string"}},
    "required": ["said"],
    "additionalProperties": False,
}
PRICE = Price(PRICE_IN / 1e6, PRICE_OUT / 1e6)
FAULTS = ("429:0.1", "500", "503:0.2", "drop", "hang:0.9", "truncated", "prose", "schema", "empty")
UNUSABLE = ("cut off", "not JSON", "breaks the schema", "is empty")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.05)
    for name in ("LLM_API_KEY", "OPENROUTER_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def questions(count: int) -> list[Question]:
    return [
        Question(key=str(n), system="Repeat.", user=f"word {n}", schema=SCHEMA, max_tokens=100)
        for n in range(count)
    ]


def repeat(system: str, user: str) -> Any:
    return {"said": user}


def ask(
    server: LLMServer, asked: Iterable[Question], **settings: Any
) -> tuple[dict[str, Answer], Spent]:
    """Answers by key; fails if a question is answered twice."""
    found: dict[str, Answer] = {}

    def take(answer: Answer) -> None:
        assert answer.key not in found
        found[answer.key] = answer

    url = server.host if settings.get("provider") == "anthropic" else server.url
    llm = LLM(**{"model": "scripted", "base_url": url, "timeout": 0.6, **settings})
    return found, asyncio.run(ask_all(llm, asked, on_answer=take))


def often(seed: int, share: float, *kinds: str) -> Callable[[int, str], str | None]:
    draw = random.Random(seed)
    faults = [draw.choice(kinds) if draw.random() < share else None for _ in range(5000)]
    return lambda number, user: faults[number]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_every_question_is_settled_once_whatever_goes_wrong(provider: str) -> None:
    with LLMServer(repeat, fault=often(1, 0.4, *FAULTS, "wrapped"), latency=0.01) as server:
        found, spent = ask(server, questions(80), provider=provider, concurrency=16, price=PRICE)
        billed = server.billed
    assert found.keys() == {str(n) for n in range(80)}
    right = {key for key, answer in found.items() if answer.content == {"said": f"word {key}"}}
    failed = {key: answer.failure for key, answer in found.items() if answer.content is None}
    assert right | failed.keys() == found.keys()
    assert len(right) == spent.answered > 70
    assert all(
        why.endswith("3 times") and any(u in why for u in UNUSABLE) for why in failed.values()
    )
    assert len(failed) == spent.failed
    assert billed <= spent.cost + spent.lost + 1e-9
    assert spent.cost == pytest.approx(sum(answer.cost for answer in found.values()))
    assert spent.stopped is None


@pytest.mark.parametrize("seed", range(4))
def test_what_a_run_may_cost_is_never_passed_and_well_used(seed: int) -> None:
    faults = often(seed, 0.2, "drop", "hang:0.4", "500", "prose", "truncated")
    most = 0.02 + 0.01 * seed
    with LLMServer(repeat, fault=faults, latency=0.005) as server:
        settings = {"concurrency": 12, "price": PRICE, "max_cost": most, "timeout": 0.3}
        found, spent = ask(server, questions(2000), **settings)
        time.sleep(0.5)  # what hangs is billed when it ends
        billed = server.billed
    assert billed <= spent.cost + spent.lost + 1e-9 <= most + 1e-9
    worst = client.worst_case(questions(1)[0], PRICE)
    assert spent.cost + spent.lost > most - 2 * worst
    assert f"could pass --max-cost {most:g}" in spent.stopped
    assert 0 < len(found) < 2000


def test_what_the_server_says_that_it_costs_counts() -> None:
    with LLMServer(repeat, says_cost=True, prices=False) as server:
        found, spent = ask(server, questions(10))
        assert spent.cost == pytest.approx(server.billed)
        assert sum(answer.cost for answer in found.values()) == pytest.approx(server.billed)
    with LLMServer(repeat, prices=False) as server:
        found, spent = ask(server, questions(10))
        assert spent.cost is None
        assert {answer.cost for answer in found.values()} == {None}
        assert spent.prompt_tokens == sum(answer.prompt_tokens for answer in found.values()) > 0


def test_too_many_requests_become_fewer_and_then_more_again() -> None:
    with LLMServer(repeat, limit=3, latency=0.03) as server:
        llm = LLM(model="scripted", base_url=server.url, concurrency=16)
        spent, seen = Spent(), []

        def take(answer: Answer) -> None:
            assert answer.content
            seen.append(spent.concurrency)
            if len(seen) == 60:
                server.limit = None  # the rush hour is over

        asyncio.run(ask_all(llm, questions(220), on_answer=take, spent=spent))
        refused = len(server.asked) - len(server.answered)
    assert spent.answered == 220
    assert spent.least_concurrency <= 3
    assert max(seen[20:60]) <= 8  # after the first refusals it stays near what is served
    assert refused < 60
    assert seen[-1] > 8


def test_the_servers_wish_to_wait_is_heeded() -> None:
    times: list[float] = []

    def fault(number: int, user: str) -> str | None:
        times.append(time.monotonic())
        return "429:1" if number == 0 else None

    with LLMServer(repeat, fault=fault) as server:
        _, spent = ask(server, questions(5), concurrency=5)
    assert times[1] - times[0] >= 1.0
    assert (spent.answered, spent.requests) == (5, 6)
    with LLMServer(repeat, fault=lambda n, u: "429:3600") as server:
        found, spent = ask(server, questions(5), concurrency=5)
    assert not found
    assert "3,6" in spent.stopped
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "advice"),
    [("401", "check the key"), ("402", "no credit"), ("404", "--model"), ("400", "--model")],
)
def test_what_will_be_refused_again_ends_the_run(status: str, advice: str) -> None:
    with LLMServer(repeat, fault=lambda n, u: status) as server:
        found, spent = ask(server, questions(50))
        assert len(server.asked) <= 4
    assert not found
    assert f"said {status} (scripted {status})" in spent.stopped
    assert advice in spent.stopped


def test_a_key_that_ends_during_a_run_ends_it_and_one_bad_question_does_not() -> None:
    with LLMServer(repeat, fault=lambda n, u: "401" if n >= 20 else None) as server:
        found, spent = ask(server, questions(50), concurrency=4)
        assert len(server.asked) <= 24
    assert len(found) == spent.answered == 20
    assert "said 401" in spent.stopped
    with LLMServer(repeat, fault=lambda n, u: "400" if u == "word 7" else None) as server:
        found, spent = ask(server, questions(50))
    assert [key for key, answer in found.items() if answer.content is None] == ["7"]
    assert found["7"].failure == "the server said 400 (scripted 400)"
    assert spent.stopped is None


def test_a_server_that_serves_nothing_is_not_tried_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    with LLMServer(repeat) as server:
        pass
    found, spent = ask(server, questions(50))
    assert [answer.failure for answer in found.values()] == [
        "no connection (All connection attempts failed), 8 times"
    ]
    assert spent.stopped.startswith(f"{server.url} serves nothing: no connection")


def test_a_model_that_can_not_do_it_is_not_asked_forever() -> None:
    with LLMServer(lambda system, user: "I would rather not.") as server:
        found, spent = ask(server, questions(500))
    assert len(found) < 40
    assert "failed one after another" in spent.stopped
    assert "not JSON" in spent.stopped


NO_ANSWERS = {
    "openai": (
        "<html>Welcome</html>", "[1]", "null", '{"choices": [{', '{"choices": "x"}',
        '{"choices": [], "usage": {"cost": -1}}', '{"choices": [], "model": 5}',
        '{"choices": [{"message": {"content": []}}]}', "[" * 9999,
        '{"choices": [], "usage": {"prompt_tokens": "7"}}',
    ),
    "anthropic": ("<html>Welcome</html>", "null", "{}", '{"content": null, "usage": {}}'),
}  # fmt: skip


@pytest.mark.parametrize("provider", NO_ANSWERS)
def test_what_is_no_answer_at_all_is_a_failure_that_may_have_cost(provider: str) -> None:
    bodies = NO_ANSWERS[provider]

    def fault(number: int, user: str) -> str:
        return f"raw:{bodies[int(user.removeprefix('word '))]}"

    with LLMServer(repeat, fault=fault) as server:
        found, spent = ask(server, questions(len(bodies)), provider=provider, price=PRICE)
    for answer in found.values():
        assert answer.failure.startswith("what came is no answer of such a server (")
        assert answer.failure.endswith("), 3 times")
    assert (len(found), spent.cost) == (len(bodies), 0)
    assert spent.lost == pytest.approx(
        3 * sum(client.worst_case(one, PRICE) for one in questions(len(bodies)))
    )


def test_a_routers_own_words_are_safe_to_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_WAIT_S", 0.01)
    body = '{"error": {"message": "\\u001b[2Jtoo\\nlong", "code": "context_length_exceeded"}}'
    with LLMServer(repeat, fault=lambda number, user: f"raw:{body}") as server:
        found, _ = ask(server, questions(1))
    assert found["0"].failure == "the server said 500 ([2Jtoo long), 8 times"
    deep = '{"said": ' + "[" * 9999
    with LLMServer(lambda system, user: deep) as server:
        assert "not JSON" in ask(server, questions(1))[0]["0"].failure


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_server_without_schemas_is_told_in_words(
    provider: str, caplog: pytest.LogCaptureFixture
) -> None:
    with LLMServer(repeat, takes_schema=False) as server:
        found, _ = ask(server, questions(20), provider=provider)
    assert all(answer.content for answer in found.values())
    assert "does not take a JSON schema" in caplog.text
    assert len(caplog.records) == 1
    last = server.bodies[-1]
    system = last["system"] if provider == "anthropic" else last["messages"][0]["content"]
    assert "response_format" not in last
    assert '"said"' in system


def test_a_server_without_temperatures_keeps_its_schemas() -> None:
    with LLMServer(repeat, takes_temperature=False) as server:
        found, _ = ask(server, questions(20))
    assert all(answer.content for answer in found.values())
    assert "temperature" not in server.bodies[-1]
    assert server.bodies[-1]["response_format"]["json_schema"]["strict"] is True


def test_an_answer_that_fits_may_still_be_complained_of() -> None:
    with LLMServer(lambda system, user: {"said": "no" if "3" in user else "yes"}) as server:
        found: list[Answer] = []
        asyncio.run(
            ask_all(
                LLM(model="scripted", base_url=server.url),
                questions(5),
                on_answer=found.append,
                complaint=lambda content: "it says no" if content["said"] == "no" else None,
            )
        )
    assert {answer.key: answer.failure for answer in found if answer.failure} == {
        "3": "it says no, 3 times"
    }


def test_no_key_goes_to_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("OPENAI_API_KEY", "OPENROUTER_API_KEY", "ANTHROPIC_API_KEY")
    for name in (*keys, "OPENAI_ADMIN_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.setenv(name, "secret")
    with LLMServer(repeat) as server:
        for provider in ("openai", "anthropic"):
            ask(server, questions(1), provider=provider)
        assert not any("secret" in str(headers) for headers in server.headers)
        monkeypatch.setenv("LLM_API_KEY", "mine")
        ask(server, questions(1))
        assert server.headers[-1]["authorization"] == "Bearer mine"
        ask(server, questions(1), provider="anthropic")
        sent = server.headers[-1]  # which of the two depends on the SDK's version
        assert sent.get("x-api-key", sent.get("authorization", "")).endswith("mine")
    monkeypatch.delenv("OPENROUTER_API_KEY")
    with pytest.raises(ConfigError, match="OPENROUTER_API_KEY is not set"):
        asyncio.run(ask_all(LLM(model="m"), questions(1), on_answer=lambda answer: None))


def test_a_server_is_asked_for_its_model_and_price() -> None:
    with LLMServer(repeat) as server:
        found = asyncio.run(look_up(LLM(model="", base_url=server.url)))
        assert (found.model, found.price) == ("scripted", PRICE)
    with LLMServer(repeat, models=("a", "b"), prices=False) as server:
        with pytest.raises(ConfigError, match=r"2 models \(a, b\); name one"):
            asyncio.run(look_up(LLM(model="", base_url=server.url)))
        found = asyncio.run(look_up(LLM(model="a", base_url=server.url)))
        assert found.price is None
    with pytest.raises(ConfigError, match="failed: no connection"):
        asyncio.run(look_up(LLM(model="", base_url=server.url)))
    for cost, price in ((1.0, None), (float("nan"), PRICE), (-1.0, PRICE)):
        with pytest.raises(ConfigError, match="--max-cost"):
            client.check(LLM(model="m", price=price, max_cost=cost))


def test_what_a_caller_raises_ends_the_run_at_once() -> None:
    def take(answer: Answer) -> None:
        raise OSError(28, "No space left on device")

    with LLMServer(repeat) as server:
        llm = LLM(model="scripted", base_url=server.url, concurrency=4)
        with pytest.raises(OSError, match="No space"):
            asyncio.run(ask_all(llm, questions(100), on_answer=take))
        assert len(server.asked) <= 8
    assert threading.active_count() < 50
