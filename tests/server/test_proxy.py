"""The pass-through against a real upstream HTTP server, and with the real OpenAI client."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from neuroscope_vllm.server.guard import MAX_CHAT
from neuroscope_vllm.server.routes.proxy import MAX_PASSED_BYTES
from tests.server.side import Side, http, wait_until
from tests.server.upstream import CHUNKS, Upstream


@pytest.fixture
def proxied(new_side: Callable[..., Side], upstream: Upstream) -> Side:
    return new_side(upstream=upstream.url)


def test_chunks_pass_one_by_one(proxied: Side, upstream: Upstream):
    body = {"model": "m", "messages": [], "stream": True}
    threading.Timer(0.2, upstream.go.put, [None]).start()
    with http.stream("POST", proxied.base + "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = (line for line in response.iter_lines() if line)
        for chunk in CHUNKS:
            assert json.loads(next(lines)[6:]) == chunk
            assert upstream.go.empty()
            upstream.go.put(None)
        assert next(lines) == "data: [DONE]"


def test_status_body_and_headers_pass(proxied: Side, upstream: Upstream):
    headers = {"authorization": "Bearer k", "x-request-id": "mine", "cookie": "secret=1"}
    post = proxied.base + "/v1/completions"
    answer = http.post(post, json={"bad": True}, headers=headers)
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "bad"}})
    assert answer.headers["x-request-id"] == "from-upstream"
    seen = upstream.seen[-1]
    assert (seen["authorization"], seen["x-request-id"]) == ("Bearer k", "mine")
    assert "cookie" not in seen
    assert proxied.get("/v1/models?a=b%20c").json()["path"] == "/v1/models?a=b%20c"


def test_the_openai_client_works_through_it(proxied: Side, upstream: Upstream):
    client = openai.OpenAI(base_url=proxied.base + "/v1", api_key="k", max_retries=0)
    messages: Any = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="m", messages=messages)
    assert whole.choices[0].message.content == "whole"
    for _ in range(4):
        upstream.go.put(None)
    stream = client.chat.completions.create(model="m", messages=messages, stream=True)
    assert [chunk.choices[0].delta.content for chunk in stream] == ["one ", "two ", "three"]
    assert [model.id for model in client.models.list()] == ["m"]


def test_a_client_that_leaves_cancels_upstream(proxied: Side, upstream: Upstream):
    client = openai.OpenAI(base_url=proxied.base + "/v1", api_key="k", max_retries=0, timeout=0.3)
    with pytest.raises(openai.APITimeoutError, match="timed out"):
        client.chat.completions.create(model="m", messages=[], extra_body={"hang": True})
    assert upstream.client_left.wait(5)


def test_ready_follows_upstream(proxied: Side, upstream: Upstream):
    assert proxied.get("/ready").status_code == 503
    assert len(proxied.get("/ready").json()["reasons"]) == 1
    upstream.healthy = False
    assert "500" in proxied.get("/ready").json()["reasons"][-1]
    upstream.healthy = True


def test_upstream_down_is_502_and_none_is_503(new_side: Callable[..., Side], side: Side):
    down = new_side(upstream="http://127.0.0.1:9")
    answer = http.post(down.base + "/v1/chat/completions", json={})
    assert answer.status_code == 502
    assert answer.json()["error"]["type"] == "server_error"
    assert side.get("/v1/models").status_code == 503
    assert wait_until(lambda: down.get("/ready").status_code == 503)


def test_an_answer_that_upstream_breaks_off_is_not_ended_cleanly(proxied: Side, upstream: Upstream):
    post = proxied.base + "/v1/chat/completions"
    upstream.go.put(None)
    with http.stream("POST", post, json={"stream": True, "cut": True}) as response:
        chunks = response.iter_raw()
        assert b"one" in next(chunks)
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            next(chunks)


def test_bodies_together_have_a_ceiling(proxied: Side):
    """Of chats that are not sent to their end, which so are on their way for long."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    size = MAX_CHAT - 1
    with contextlib.ExitStack() as stack:
        asking = []
        for _ in range(MAX_PASSED_BYTES // size + 1):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", proxied.port)))
            one.sendall(head % (size + 1) + b"{" * size)
            asking.append(one)
        wait_until(lambda: proxied.counters().get("passed_refused") == 1)
        (refused,) = select.select(asking, [], [], 10)[0]
        assert b"64 MiB" in refused.recv(4096)
    wait_until(lambda: http.post(f"{proxied.base}/v1/completions", json={}).status_code == 200)
    assert proxied.counters()["passed_refused"] == 1
