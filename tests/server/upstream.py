"""A server that stands for vLLM's own, which the side process passes chats to."""

from __future__ import annotations

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
