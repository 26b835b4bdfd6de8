"""An OpenAI-compatible server that answers with scripted words, and a fake engine that runs them:
what the page needs of vLLM, without a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
from tokenizers import Tokenizer

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.engine.fake import FakeEngine, Script

PAUSE_S = 0.01
EOS = "<eos>"


class Engine(FakeEngine):
    """Says of its SAE what a real worker says: figures of a self-test, and optionally another SAE,
    whose cards can then be read."""

    sae: SAEInfo | None = None
    calibration: str | None = None

    def _hello(self, role: str, counters: dict[str, int]) -> wire.Hello:
        hello = super()._hello(role, counters)
        if role != "worker":
            return hello
        hello.self_test = [wire.SelfTest(layer, 100, 61.5, 58.0, 0.742) for layer in self.layers]
        if self.sae is not None:
            hello.sites = [
                msgspec.structs.replace(site, sae=self.sae, calibration=self.calibration)
                for site in hello.sites
            ]
        return hello


class Talker:
    """`engine` may come later: the side process that it connects to wants our address first.

    Attributes:
        bodies: What was asked, latest last.
        answer: From the last message and whether it is steered to the answer's text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.engine: FakeEngine | None = None
        self.bodies: list[dict[str, Any]] = []
        self.answer: Callable[[str, bool], str] = answer
        self.pause_s = PAUSE_S
        self._tokenizer = tokenizer
        talker = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._json({})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                talker.bodies.append(body)
                name = self.headers["x-request-id"]
                if self.path.startswith("/v1/completions"):
                    talker.run(f"cmpl-{name}", body["prompt"], "!")
                    self._json({"id": f"cmpl-{name}"})
                    return
                text = talker.answer(body["messages"][-1]["content"], "vllm_xargs" in body)
                threading.Thread(
                    target=talker.run, args=(f"chatcmpl-{name}", chat(body["messages"]), text)
                ).start()
                self._stream([text[: len(text) // 2], text[len(text) // 2 :]])

            def _json(self, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, parts: list[str]) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                for part in parts:
                    chunk = {"choices": [{"index": 0, "delta": {"content": part}}]}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def run(self, request_id: str, prompt: str, text: str) -> None:
        assert self.engine is not None
        ids = [self._tokenizer.encode(part).ids for part in (prompt, text + EOS)]
        script = Script(pause_s=self.pause_s, finish_reason="stop")
        self.engine.run(request_id, ids[0], ids[1], script)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def chat(messages: list[dict[str, str]]) -> str:
    """The chat template."""
    turns = "".join(f"{EOS}{one['role']}: {one['content']}\n" for one in messages)
    return f"{turns}{EOS}assistant: "


def answer(message: str, steered: bool) -> str:
    return f"You said {message}." if not steered else f"You shout {message.upper()}!"
