"""Results of a batch, in vLLM's own words."""

from __future__ import annotations

import json

from vllm.entrypoints.launchers.run_batch import BatchRequestInput, BatchRequestOutput

from tests.support.llm_server import Answer


def batch_output(
    number: int, request: BatchRequestInput, answer: Answer, custom_id: str | None = None
) -> str:
    """What `vllm run-batch` writes for a request; the first three go wrong."""
    text = json.dumps(answer("", request.body.messages[1]["content"]))
    message = {"role": "assistant", "content": "no" if number == 1 else text}
    finish = "length" if number == 2 else "stop"
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {
        "model": "served",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": "r", "body": body}
    failed = {"status_code": 400, "request_id": "r", "body": None}
    return BatchRequestOutput.model_validate(
        {
            "id": f"vllm-{number}",
            "custom_id": custom_id or request.custom_id,
            "response": failed if number == 0 else response,
            "error": {"error": {"message": "too long"}} if number == 0 else None,
        }
    ).model_dump_json()
