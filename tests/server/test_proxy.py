"""The pass-through against a real upstream HTTP server, and with the real OpenAI client."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest

from tests.server.side import Side, http, wait_until

CHUNKS = [{"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": "m",
           "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
          for word in ("one ", "two ", "three")]  # fmt: skip


class Upstream:
    """Answers as vLLM does; a streamed chunk leaves when the test says `go`."""

    def __init__(self) -> None:
        self.go: queue.Queue[None] = queue.Queue()
        self.seen: list[dict[str, str]] = []
        self.client_left = threading.Event()
        self.healthy = True
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/health":
                    self._json(200 if upstream.healthy else 500, {})
                else:
                    self._json(
                        200,
                        {
                            "object": "list",
                            "data": [{"id": "m", "object": "model"}],
                            "path": self.path,
                        },
                    )

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                upstream.seen.append({name.lower(): value for name, value in self.headers.items()})
                if body.get("bad"):
                    self._json(400, {"error": {"message": "bad"}})
                elif body.get("stream"):
                    self._stream(1 if body.get("cut") else len(CHUNKS) + 1)
                elif body.get("hang"):
                    self._hang()
                else:
                    message = {"role": "assistant", "content": "whole"}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    self._json(200, {"id": "chatcmpl-y", "object": "chat.completion", "created": 1,
                                     "model": "m", "choices": [choice]})  # fmt: skip

            def _json(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.send_header("x-request-id", "from-upstream")
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, count: int) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream; charset=utf-8")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for chunk in [*map(json.dumps, CHUNKS), "[DONE]"][:count]:
                    upstream.go.get()
                    data = f"data: {chunk}\n\n".encode()
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                if count > len(CHUNKS):
                    self.wfile.write(b"0\r\n\r\n")
                self.close_connection = True

            def _hang(self) -> None:
                if self.rfile.read(1) == b"":
                    upstream.client_left.set()
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.server.shutdown()
    upstream.server.server_close()


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
