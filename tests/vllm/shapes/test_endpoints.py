"""Endpoints beside chats and completions: the stream finds their requests by the answer's id, and
says what was answered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.vllm.shapes.asking import CHAT, Api, data_lines, new_name

HELLO = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 9}

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@streamed_or_not
@pytest.mark.parametrize("own_id", [None, "resp_mine"])
def test_responses(api: Api, stream: bool, own_id: str | None) -> None:
    """Found by the response's `id`, though the engine's is another."""
    own = f"{own_id}-{new_name()}" if own_id else None
    body: dict[str, Any] = {
        "input": "hello",
        "max_output_tokens": 9,
        "stream": stream,
        "model": "tiny",
    }
    if own:
        body["request_id"] = own
    text, said = "", None
    with httpx.stream("POST", f"{api.served.chat}/v1/responses", json=body, timeout=60) as response:
        if stream:
            for chunk in data_lines(response):
                text += chunk["delta"] if chunk["type"] == "response.output_text.delta" else ""
                said = chunk.get("response")
        else:
            said = json.loads(response.read())
            text = said["output"][0]["content"][0]["text"]
    assert said is not None
    assert own in (None, said["id"])
    (trace,) = api.served.trace(said["id"])
    events = trace["events"]
    tokens = [e for e in events if e["event"] in ("prompt", "token")]
    api.check_events(events, said["id"], 0, [e["token_id"] for e in tokens])
    assert "".join(e["token"] for e in tokens if e["event"] == "token") == text
    assert events[-1]["prompt_tokens"] == said["usage"]["input_tokens"]
    assert events[-1]["completion_tokens"] == said["usage"]["output_tokens"]


def test_messages(api: Api) -> None:
    """Anthropic's form."""
    said = api.post("/v1/messages", HELLO, new_name(), timeout=60).json()
    (trace,) = api.served.trace(said["id"])
    events = trace["events"]
    tokens = [e for e in events if e["event"] in ("prompt", "token")]
    api.check_events(events, said["id"], 0, [e["token_id"] for e in tokens])
    told = "".join(e["token"] for e in tokens if e["event"] == "token")
    assert told == said["content"][0]["text"]


def test_batch_of_chats(api: Api) -> None:
    """vLLM names conversation i `<id>_<i>`, which a client's own id may be as well: each is a
    request of its own."""
    chats = [[{"role": "user", "content": text}] for text in ("hello", "a quick fox")]
    body = {"messages": chats, "max_tokens": 9, "return_token_ids": True}
    said = api.post(f"{CHAT}/batch", body, new_name(), timeout=60).json()
    for choice in said["choices"]:
        request_id = f"{said['id']}_{choice['index']}"
        (trace,) = api.served.trace(request_id)
        tokens = [e for e in trace["events"] if e["event"] in ("prompt", "token")]
        api.check_events(trace["events"], request_id, 0, [e["token_id"] for e in tokens])
        generated = [e for e in tokens if e["event"] == "token"]
        assert [e["token_id"] for e in generated] == choice["token_ids"]
        assert "".join(e["token"] for e in generated) == choice["message"]["content"]


def test_generative_scoring(api: Api) -> None:
    body = {"query": "hello ", "items": ["a", "fox"], "label_token_ids": [10, 11]}
    name = new_name()
    said = api.post("/generative_scoring", body, name, timeout=60).json()
    found = api.served.trace(name, 2)
    for index, trace in enumerate(found):
        events = trace["events"]
        context = [e["token_id"] for e in events if e["event"] in ("prompt", "token")]
        api.check_events(events, said["id"], index, context)


@streamed_or_not
@pytest.mark.parametrize("detokenize", [True, False])
def test_tokens_in_tokens_out(api: Api, stream: bool, detokenize: bool) -> None:
    """Where vLLM makes no text, the stream does."""
    name = new_name()
    # Whole characters, so that the answer's text is that of its own tokens.
    prompt = api.post("/tokenize", {"prompt": "a quick fox " * 6, "model": "tiny"}).json()["tokens"]
    params = {"max_tokens": 9, "temperature": 0, "detokenize": detokenize, "ignore_eos": True}
    body = {
        "token_ids": prompt,
        "sampling_params": params,
        "stream": stream,
    }
    path = "/inference/v1/generate"
    response = api.post(path, body, name, timeout=60)
    assert response.status_code == 200, response.text
    chunks = [response.json()] if not stream else list(data_lines(response))
    generated = [t for c in chunks for one in c["choices"] for t in one.get("token_ids") or []]
    assert len(generated) == 9
    (trace,) = api.served.trace(name)
    events = trace["events"]
    api.check_events(events, f"generate-tokens-{name}", 0, [*prompt, *generated])
    text = "".join(e["token"] for e in events if e["event"] == "token")
    given = {"tokens": generated, "model": "tiny"}
    whole = api.post("/detokenize", given).json()["prompt"]
    if "\ufffd" not in whole:  # half a character at the end is no text yet, here as in vLLM
        assert text == whole
