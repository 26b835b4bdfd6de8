"""An OpenAI server that says what a test gives it, in chunks of the test's own cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Said = tuple[int, dict[str, Any], str | None]
"""Choice, delta and finish reason of a chunk."""
CREATED = 1
"""Unix seconds of all answers."""


def chat_chunk(request_id: str, said: Said) -> dict[str, Any]:
    index, delta, reason = said
    choice = {"index": index, "delta": delta, "finish_reason": reason}
    return {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": "m",
        "choices": [choice],
    }


def text_chunk(request_id: str, said: Said) -> dict[str, Any]:
    index, delta, reason = said
    choice = {"index": index, "text": delta["content"], "finish_reason": reason}
    chunk = {"id": request_id, "object": "text_completion", "created": CREATED, "model": "m"}
    return {**chunk, "choices": [choice]}


@contextmanager
def speaker(request_id: str, said: list[Said]) -> Iterator[str]:
    """Its URL. Whole answers are the deltas' contents, joined."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if body.get("stream"):
                make = chat_chunk if "messages" in body else text_chunk
                chunks = [make(request_id, one) for one in said]
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                chunks.append({**chunks[-1], "choices": [], "usage": usage})
                lines = [f"data: {one}\n\n" for one in [*map(json.dumps, chunks), "[DONE]"]]
                self._send("text/event-stream", "".join(lines))
            else:
                self._send("application/json", json.dumps(self._whole()))

        def _whole(self) -> dict[str, Any]:
            texts: dict[int, str] = {}
            for index, delta, _ in said:
                texts[index] = texts.get(index, "") + (delta.get("content") or "")
            choices = [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": t},
                    "finish_reason": "stop",
                }
                for i, t in texts.items()
            ]
            return {
                "id": request_id,
                "object": "chat.completion",
                "created": CREATED,
                "model": "m",
                "choices": choices,
            }

        def _send(self, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
