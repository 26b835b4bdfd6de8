"""Steering of the server on transformers: vLLM's tests of it, against a forward hook."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.served import Served, start_transformers
from tests.vllm.test_steering import (
    direction,
    early_sae,
    firing,
    plain,
    reference,
    test_a_rule_stops_tags_and_steers,
    test_a_running_request_is_steered_otherwise,
    test_an_ablated_feature_is_not_active_any_more,
    test_it_is_what_a_forward_hook_does,
    test_malformed_specifications_are_refused_and_harm_nobody,
    test_presets_are_the_operators,
    test_the_stream_says_what_was_edited,
    test_what_the_features_are_is_what_the_layers_above_get,
    test_what_we_note_is_not_taken_from_clients,
    test_who_is_not_steered_is_left_alone,
)

__all__ = [
    "direction",
    "early_sae",
    "firing",
    "plain",
    "reference",
    "test_a_rule_stops_tags_and_steers",
    "test_a_running_request_is_steered_otherwise",
    "test_an_ablated_feature_is_not_active_any_more",
    "test_it_is_what_a_forward_hook_does",
    "test_malformed_specifications_are_refused_and_harm_nobody",
    "test_presets_are_the_operators",
    "test_the_stream_says_what_was_edited",
    "test_what_the_features_are_is_what_the_layers_above_get",
    "test_what_we_note_is_not_taken_from_clients",
    "test_who_is_not_steered_is_left_alone",
]


@pytest.fixture(scope="module")
def caches() -> bool:
    return False


@pytest.fixture(scope="module")
def served(
    tiny_gemma2: Path,
    tiny_sae: Path,
    early_sae: Path,
    direction: tuple[Path, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    more = ("--sae", str(early_sae), "--steering", str(direction[0]), "--top-k", "128")
    server = start_transformers(
        tiny_gemma2,
        tiny_sae,
        tmp_path_factory.mktemp("steering") / "log",
        flags=(*more, "--ranking", "activation"),
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()
