"""A server on transformers for all tests that need no other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.oracle import Oracle
from tests.support.served import NO_VLLM, Served, start_transformers
from tests.vllm.shapes.asking import Api


@pytest.fixture(scope="package")
def shapes_server(
    tiny_llama: Path, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    server = start_transformers(
        tiny_llama,
        tiny_sae,
        tmp_path_factory.mktemp("transformers") / "serve.log",
        flags=("--ranking", "activation", "--top-k", "8"),
        env=NO_VLLM,
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="package")
def api(shapes_server: Served, tiny_llama: Path, tiny_sae: Path) -> Api:
    no_sinks = {20: math.inf}  # there is no calibration
    return Api(shapes_server, Oracle(tiny_llama, {20: tiny_sae}, no_sinks))
