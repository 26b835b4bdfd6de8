"""The HTTP API against its own OpenAPI document: whatever that allows, and much that it does not,
is answered, in time, as it says, and never with a 5xx.

What no schema can say is refused too, such as a layer that is not observed: that what a schema
allows is accepted (`positive_data_acceptance`) is the one check left out.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.launch import SideConfig
from neuroscope_vllm.engine.fake import FakeEngine, Script
from neuroscope_vllm.server.app import create_app
from tests.server.side import Side

TIMEOUT_S = 20
STREAM = "/v1/features/stream"
SUPPRESSED = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]
ANY_OF_IT = settings(
    max_examples=30,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=SUPPRESSED,
)

document = create_app(
    SideConfig(settings=Settings(), endpoint="", model="", tokenizer_file=None, upstream=None)
).openapi()
# Chats are vLLM's to answer, and there is none here: a 503 says so.
schema = schemathesis.openapi.from_dict(document).exclude(tag="pass-through to vLLM")
operations = [found.ok() for found in schema.get_all_operations()]


@pytest.fixture(scope="module")
def busy(side: Side, engine: FakeEngine) -> Side:
    """While one request runs and others have ended."""
    for name in ("0", "done"):
        engine.run(name, [1, 2, 3], [4, 5])
    script = Script(pause_s=0.02, finish_reason=None)
    running = threading.Thread(target=engine.run, args=("1", [1], [2] * 2000, script), daemon=True)
    running.start()
    return side


def test_the_document_is_the_one_that_is_served(side: Side) -> None:
    assert side.get("/openapi.json").json() == document


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        pytest.param(operation, mode, id=f"{operation.label}-{mode.value}")
        for operation in operations
        for mode in GenerationMode
        # Where nothing but a path is asked for, no string is wrong.
        if mode is GenerationMode.POSITIVE or operation.query or operation.body
    ],
)
def test_every_answer_is_as_documented(busy: Side, operation: Any, mode: GenerationMode) -> None:
    @ANY_OF_IT
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if operation.path == STREAM:
            _check_stream(case, busy.base)
        else:
            answer = case.call(base_url=busy.base, timeout=TIMEOUT_S)
            left_out = [positive_data_acceptance]
            if answer.status_code == 431:  # of a query of many parameters: refused all the same
                left_out.append(negative_data_rejection)
            case.validate_response(answer, excluded_checks=left_out)

    check()


def _check_stream(case: Any, base: str) -> None:
    """A stream of all requests never ends: its head is enough."""
    asked = case.as_transport_kwargs(base_url=base)
    with requests.request(**asked, stream=True, timeout=TIMEOUT_S) as answer:
        assert answer.status_code < 500
        if answer.status_code == 200:
            kind = answer.headers["content-type"].partition(";")[0]
            assert kind in ("text/event-stream", "application/x-ndjson")
        elif answer.status_code != 204:
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])
