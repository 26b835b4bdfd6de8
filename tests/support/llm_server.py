"""A language model's HTTP server on loopback that does what a test says, faults included.

It serves OpenAI's chat completions and Anthropic's messages from one function, and keeps count of
what it was asked, how many requests ran at once, and what it would bill.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PRICE_IN, PRICE_OUT = 1.0, 4.0
"""US dollars for a million tokens."""

Answer = Callable[[str, str], Any]
"""From the system and the user message to the answer: an object, or text as it stands."""
Fault = Callable[[int, str], str | None]
"""From the request's number (from 0) and the user message to what goes wrong:

429:SECONDS  500  503:SECONDS  401 ..   that status, with Retry-After
hang:SECONDS                            answers (and bills) after that
drop                                    closes the connection after the model has answered (billed)
truncated  prose  schema  empty         an answer of status 200 that can not be used
wrapped                                 the right answer, between other text
raw:BODY                                that, of status 200
"""


class LLMServer:
    """`with LLMServer(answer) as server:` listens at `server.url`.

    Attributes:
        asked: User messages, in order of arrival.
        bodies: The requests' JSON, likewise.
        headers: Likewise, names in lower case.
        answered: User messages that were answered whole.
        billed: US dollars.
        most_at_once: Requests that ran at the same time.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        fault: Fault = lambda number, user: None,
        models: tuple[str, ...] = ("scripted",),
        prices: bool = True,
        says_cost: bool = False,
        limit: int | None = None,
        latency: float = 0.0,
        takes_schema: bool = True,
        takes_temperature: bool = True,
    ) -> None:
        """
        Args:
            prices: Whether /models lists them, as OpenRouter does.
            says_cost: Whether usage has a cost, likewise.
            limit: Requests at once; further ones get a 429.
        """
        self.answer, self.fault, self.models, self.prices = answer, fault, models, prices
        self.says_cost, self.limit, self.latency = says_cost, limit, latency
        self.takes_schema, self.takes_temperature = takes_schema, takes_temperature
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: list[str] = []
        self.billed = 0.0
        self.most_at_once = self._running = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.host = f"http://127.0.0.1:{self._http.server_port}"
        self.url = f"{self.host}/v1"

    def __enter__(self) -> LLMServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def bill(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        """Usage as OpenAI writes it; the price is added to what is billed."""
        prompt = len(json.dumps(body)) // 4
        completion = min(max(len(text) // 4, 1), body.get("max_tokens", 1 << 30))
        cost = (prompt * PRICE_IN + completion * PRICE_OUT) / 1e6
        with self.lock:
            self.billed += cost
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        return {**usage, "cost": cost} if self.says_cost else usage

    def listed(self) -> list[dict[str, Any]]:
        pricing = {"prompt": str(PRICE_IN / 1e6), "completion": str(PRICE_OUT / 1e6)}
        more = {"pricing": pricing} if self.prices else {}
        return [{"id": name, "object": "model", "created": 0, **more} for name in self.models]


class _Handler(BaseHTTPRequestHandler):
    owner: LLMServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.rstrip("/").endswith("/models"):
            self._send(200, {"object": "list", "data": self.owner.listed()})
        else:
            self._send(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        owner = self.owner
        length = int(self.headers["Content-Length"])
        if len(content := self.rfile.read(length)) < length:  # the client was killed
            self.close_connection = True
            return
        body = json.loads(content)
        anthropic = self.path.endswith("/messages")
        if not anthropic and not self.path.endswith("/chat/completions"):
            self._send(404, {"error": {"message": "no such page"}})
            return
        users = [m["content"] for m in body["messages"] if m["role"] == "user"]
        system = body.get("system") or "".join(
            m["content"] for m in body["messages"] if m["role"] == "system"
        )
        with owner.lock:
            number = len(owner.asked)
            owner.asked.append(users[0])
            owner.bodies.append(body)
            owner.headers.append({k.lower(): v for k, v in self.headers.items()})
            owner._running += 1
            owner.most_at_once = max(owner.most_at_once, owner._running)
            is_one_too_many = owner.limit is not None and owner._running > owner.limit
        try:
            kind = "429:0.1" if is_one_too_many else owner.fault(number, users[0]) or ""
            self._react(kind, body, system, users[0], anthropic)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with owner.lock:
                owner._running -= 1

    def _react(
        self, kind: str, body: dict[str, Any], system: str, user: str, anthropic: bool
    ) -> None:
        owner = self.owner
        what, _, seconds = kind.partition(":")
        if what.isdigit():
            headers = {"Retry-After": seconds} if seconds else {}
            self._send(int(what), {"error": {"message": f"scripted {what}", "code": what}}, headers)
            return
        if what == "raw":
            self._send(200, seconds.encode())
            return
        for name, allowed in (
            ("response_format", owner.takes_schema),
            ("output_config", owner.takes_schema),
            ("temperature", owner.takes_temperature),
        ):
            if name in body and not allowed:
                self._send(400, {"error": {"message": f"{name} is not supported"}})
                return
        time.sleep(float(seconds) if what == "hang" else owner.latency)
        right = owner.answer(system, user)
        text = right if isinstance(right, str) else json.dumps(right, ensure_ascii=False)
        text = {
            "truncated": text[: len(text) // 2],
            "prose": "Sure! This one is about things.",
            "schema": '{"unasked": [1, 2]}',
            "empty": "",
            "wrapped": f"<think>{{hm}}</think>Here it is:\n```json\n{text}\n```\nGood luck!",
        }.get(what, text)
        usage = owner.bill(body, text)
        if what == "drop":
            self.close_connection = True
            self.connection.close()
            return
        is_cut = what == "truncated"
        self._send(200, (_messages if anthropic else _chat)(body["model"], text, is_cut, usage))
        if what in ("", "hang", "wrapped"):
            with owner.lock:
                owner.answered.append(user)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _chat(model: str, text: str, is_cut: bool, usage: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    finish = "length" if is_cut else "stop"
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": usage,
    }


def _messages(model: str, text: str, is_cut: bool, usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": "max_tokens" if is_cut else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
        },
    }
