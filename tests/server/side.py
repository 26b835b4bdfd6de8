"""A real side process on an ephemeral port, a reader of its streams, and a tokenizer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from neuroscope_vllm.core import launch
from neuroscope_vllm.core.config import Settings
from tests.support.served import lines


def make_tokenizer() -> Tokenizer:
    """One token per byte, so that every emoji is split over four; the last id is `<eos>`."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


http = httpx.Client(trust_env=False, limits=httpx.Limits(), timeout=20)
"""Shared: making a client takes 50 ms."""


def wait_until(condition: Callable[[], Any], timeout: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)
    return result


class Side:
    """A side process under test."""

    def __init__(self, process: launch.SideProcess, port: int) -> None:
        self.process = process
        self.endpoint = launch.endpoint_of(process.directory)
        self.port = port
        self.base = f"http://127.0.0.1:{port}"
        self.stream_url = f"{self.base}/v1/features/stream"

    def get(self, path: str, **options: Any) -> httpx.Response:
        return http.get(self.base + path, **options)

    def put(self, path: str, body: object) -> httpx.Response:
        return http.put(self.base + path, json=body)

    def counters(self) -> dict[str, int]:
        return self.get("/v1/features/describe").json()["counters"]

    def wait_armed(self) -> None:
        """Until a worker is armed and, where no key keeps that secret, a scheduler is heard: it has
        a connection of its own, before which what it sends is lost."""
        wait_until(lambda: self.get("/health").status_code == 200)
        wait_until(self._hears_a_scheduler)

    def _hears_a_scheduler(self) -> bool:
        answer = self.get("/v1/features/describe")
        return answer.status_code == 401 or any(
            one["role"] == "scheduler" for one in answer.json()["senders"]
        )

    def wait_done(self, request_id: str, choices: int = 1) -> list[dict[str, Any]]:
        """The trace's choices once that many are finished."""

        def done() -> list[dict[str, Any]] | None:
            found = [one for one in self._choices(request_id) if one["finished"]]
            return found if len(found) >= choices else None

        return wait_until(done)

    def wait_known(self, request_id: str, choices: int) -> None:
        """Until that many have begun."""
        wait_until(lambda: len(self._choices(request_id)) >= choices)

    def _choices(self, request_id: str) -> list[dict[str, Any]]:
        answer = self.get(f"/v1/requests/{request_id}")
        return answer.json()["choices"] if answer.status_code == 200 else []

    def read(self, request_id: str | None = None, **options: Any) -> list[dict[str, Any]]:
        """All events of a stream that ends by itself."""
        with self.open(request_id, **options) as events:
            return list(events)

    @contextmanager
    def open(
        self, request_id: str | None = None, headers: dict[str, str] | None = None, **params: Any
    ) -> Iterator[Iterator[dict[str, Any]]]:
        if request_id is not None:
            params["request_id"] = request_id
        with http.stream("GET", self.stream_url, params=params, headers=headers) as response:
            assert response.status_code == 200, response.read()
            yield parse_sse(lines(response))


def parse_sse(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Events as dicts: the data, plus `event` and `id` of the SSE lines."""
    event: dict[str, Any] = {}
    for line in lines:
        if not line:
            if "event" in event:
                yield event
            event = {}
            continue
        field, _, value = line.partition(": ")
        if field in ("event", "id"):
            event[field] = value
        elif field == "data":
            event |= json.loads(value)


def start_side(directory: Path, **options: Any) -> Side:
    """Start a side process as vLLM's front process does."""
    settings = msgspec.convert(options.pop("settings", {}), Settings)
    listener = launch.listen("127.0.0.1", 0)
    options = {"model": "fake", "tokenizer_file": None, "upstream": None, "labels": {}} | options
    process = launch.launch(settings, directory=directory, listener=listener, **options)
    side = Side(process, listener.getsockname()[1])
    assert launch.wait_for_socket(directory)
    return side
