"""The client's side processes, engines and tokenizer are those of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from neuroscope_vllm import Client
from tests.server.conftest import engine, new_side, side, tokenizer, tokenizer_file
from tests.server.side import Side

__all__ = ["client", "engine", "new_side", "side", "tokenizer", "tokenizer_file"]


@pytest.fixture
def client(side: Side) -> Iterator[Client]:
    with Client(side.base) as client:
        yield client
