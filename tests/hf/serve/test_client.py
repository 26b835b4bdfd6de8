"""Our client and the official one against the demo that transformers serves: vLLM's tests.

Left out is what only the client and the hub decide; one test of whole answers stands for several.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from neuroscope_vllm.cli.demo import NAME, demo_model, demo_sae
from neuroscope_vllm.client import AsyncClient, features_of
from tests.support.served import Served, start_transformers
from tests.vllm.test_client import (
    chat,
    client,
    plain,
    test_a_chat_goes_on_while_the_side_process_is_started_again,
    test_chunk_text_is_the_text_of_its_tokens,
    test_inspection_steering_and_cards,
    test_text_completions_of_several_prompts,
    test_the_chat_example,
    texts,
)

__all__ = [
    "client",
    "plain",
    "test_a_chat_goes_on_while_the_side_process_is_started_again",
    "test_chunk_text_is_the_text_of_its_tokens",
    "test_inspection_steering_and_cards",
    "test_text_completions_of_several_prompts",
    "test_the_chat_example",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = start_transformers(
        demo_model(),
        demo_sae(),
        tmp_path_factory.mktemp("client") / "serve.log",
        server_flags=("--served-model-name", NAME, "--max-model-len", "1024"),
    )
    try:
        yield served.wait_ready()
    finally:
        served.stop()


def test_whole_answers_of_two_at_once(server: Served) -> None:
    async def ask() -> None:
        async with (
            AsyncClient(server.features) as client,
            openai.AsyncOpenAI(base_url=f"{server.chat}/v1", api_key="none") as plain,
        ):
            create = client.wrap(plain).chat.completions.create
            more = {"n": 2, "temperature": 1.0, "stop": ["."], "max_tokens": 12}
            for answer in await asyncio.gather(
                *(create(**chat(question, **more)) for question in ("What is rain?", "Count."))
            ):
                assert len(answer.choices) == 2
                for one in answer.choices:
                    assert texts(features_of(answer), one.index) == one.message.content

    asyncio.run(ask())
