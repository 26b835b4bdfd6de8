"""Neuronpedia's public export, small, on loopback: an S3 bucket that lists and serves its files."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

SOURCE = "gemma-2-2b/20-gemmascope-res-16k"


def row(number: int, description: Any, **fields: Any) -> dict[str, Any]:
    """An explanation as exported."""
    model, layer = SOURCE.split("/")
    return {
        "id": f"cm{number}",
        "modelId": model,
        "layer": layer,
        "index": str(number),
        "authorId": "clkht01d40000jv08hvalcvly",
        "description": description,
        "embedding": [0.1] * 16 if number % 2 else json.dumps([0.1] * 16),
        "typeName": "np_acts-logits-general",
        "explanationModelName": "gemini-2.5-flash-lite",
        "umap_x": 0.0,
    } | fields


def jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


class Bucket:
    """Objects by key, and how it behaves.

    Attributes:
        page: Keys in a page of a listing.
        pause: Seconds before each file.
        busy_every: Every that many requests is answered 503.
        cut: Keys whose first answer ends half-way.
        forbidden: Keys that are answered 403.
        asked: Keys asked for, without the answers 503; "" is a listing.
        most_at_once: Requests that were being answered at the same time.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.page = 1000
        self.pause = 0.0
        self.busy_every = 0
        self.cut: set[str] = set()
        self.forbidden: set[str] = set()
        self.asked: list[str] = []
        self.most_at_once = 0
        self.url = ""
        self._requests = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def put(self, rows: Iterable[dict[str, Any]], batch: int = 1024, source: str = SOURCE) -> None:
        """Explanations as exported: ordered by their index as text, in gzipped batches."""
        ordered = sorted(rows, key=lambda one: str(one["index"]))
        for number, start in enumerate(range(0, len(ordered), batch)):
            key = f"v1/{source}/explanations/batch-{number}.jsonl.gz"
            self.objects[key] = gzip.compress(jsonl(ordered[start : start + batch]))

    def fetched(self) -> list[str]:
        return sorted(key for key in self.asked if key)

    @contextmanager
    def answering(self) -> Iterator[bool]:
        """Whether this request is to be answered 503."""
        with self._lock:
            self._requests += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            busy = bool(self.busy_every) and self._requests % self.busy_every == 0
        try:
            yield busy
        finally:
            with self._lock:
                self._at_once -= 1

    def listing(self, prefix: str, token: str | None) -> str:
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        # Real tokens hold what a URL must escape.
        start = int(token.removeprefix("a+/=&")) if token else 0
        page, end = keys[start : start + self.page], start + self.page
        more = f"<NextContinuationToken>a+/=&amp;{end}</NextContinuationToken>"
        contents = "".join(
            f'<Contents><Key>{escape(key)}</Key><ETag>"x"</ETag>'
            f"<Size>{len(self.objects[key])}</Size></Contents>"
            for key in page
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>b</Name><Prefix>{escape(prefix)}</Prefix>{more if end < len(keys) else ''}"
            f"<IsTruncated>{str(end < len(keys)).lower()}</IsTruncated>{contents}"
            "</ListBucketResult>"
        )


@contextmanager
def serve_bucket() -> Iterator[Bucket]:
    bucket = Bucket()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with bucket.answering() as busy:
                if busy:
                    self._send(503, b"<Error><Code>SlowDown</Code></Error>")
                    return
                address = urlsplit(self.path)
                key = unquote(address.path).removeprefix("/")
                bucket.asked.append(key)
                if not key:
                    query = parse_qs(address.query)
                    token = query.get("continuation-token", [None])[0]
                    self._send(200, bucket.listing(query["prefix"][0], token).encode())
                    return
                time.sleep(bucket.pause)
                if key in bucket.forbidden:
                    self._send(403, b"<Error><Code>AccessDenied</Code></Error>")
                elif key in bucket.cut:
                    bucket.cut.discard(key)
                    self._send(200, bucket.objects[key], part=len(bucket.objects[key]) // 2)
                else:
                    self._send(200, bucket.objects[key])

        def _send(self, status: int, body: bytes, part: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:part])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
