"""Our client and the official one against the demo that transformers serves: vLLM's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from neuroscope_vllm.cli.demo import NAME, demo_model, demo_sae
from tests.support.served import Served, start_transformers
from tests.vllm.test_client import (
    client,
    plain,
    test_a_chat_goes_on_while_the_side_process_is_started_again,
    test_a_whole_answer_has_all_its_tokens,
    test_an_id_for_all_requests_of_a_conversation,
    test_chunk_text_is_the_text_of_its_tokens,
    test_inspection_steering_and_cards,
    test_text_completions_of_several_prompts,
    test_the_async_twin,
    test_the_chat_example,
    test_watching_from_the_terminal,
)

__all__ = [
    "client",
    "plain",
    "test_a_chat_goes_on_while_the_side_process_is_started_again",
    "test_a_whole_answer_has_all_its_tokens",
    "test_an_id_for_all_requests_of_a_conversation",
    "test_chunk_text_is_the_text_of_its_tokens",
    "test_inspection_steering_and_cards",
    "test_text_completions_of_several_prompts",
    "test_the_async_twin",
    "test_the_chat_example",
    "test_watching_from_the_terminal",
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
