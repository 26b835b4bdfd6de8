"""One server for all tests of requests' shapes: a tiny Llama, chunked prefill, prefix caching."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.oracle import Oracle
from tests.support.served import SMALL, Served, start_neuroscope
from tests.vllm.shapes.asking import Api

SHAPES = (
    *("--enforce-eager", "--max-num-batched-tokens", "64", "--max-num-seqs", "16"),
    # 32 is the smallest block of vLLM's CPU attention.
    *("--block-size", "32", "--enable-prompt-tokens-details", "--enable-scale-out"),
)


@pytest.fixture(scope="package")
def shapes_server(
    tiny_llama: Path, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    server = start_neuroscope(
        tiny_llama,
        tiny_sae,
        tmp_path_factory.mktemp("shapes") / "serve.log",
        flags=("--ranking", "activation", "--top-k", "8"),
        vllm_flags=(*SMALL, *SHAPES),
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="package")
def api(shapes_server: Served, tiny_llama: Path, tiny_sae: Path) -> Api:
    no_sinks = {20: math.inf}  # there is no calibration
    return Api(shapes_server, Oracle(tiny_llama, {20: tiny_sae}, no_sinks))
