"""Send one chat to the running demo and print its features; exit 0 only if every one is there.

python examples/check_demo.py PORT FEATURES_PORT SERVER_PID SERVER_LOG
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx

QUESTION = "What is gravity?"
START_TIMEOUT_S = 900


def main(port: str, features_port: str, server_pid: str, server_log: str) -> int:
    chat, features = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{features_port}"
    if not wait_ready(f"{features}/ready", int(server_pid)):
        print(*Path(server_log).read_text(errors="replace").splitlines()[-40:], sep="\n")
        print("check failed: the demo did not start; the lines above are its last ones.")
        return 1
    answer = httpx.post(
        f"{chat}/v1/chat/completions",
        json={
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 24,
            "temperature": 0,
        },
        timeout=120,
    ).json()
    text = answer["choices"][0]["message"]["content"]
    print(f"chat> {QUESTION}\n{text}\n")
    trace = finished_trace(features, answer["id"])
    tokens = [event for event in trace if event["event"] == "token"]
    for event in tokens:
        top = "; ".join(
            f"{f['label'] or 'unlabelled'} [{f['index']}] {f['activation']:.1f}"
            for f in event["top_features"][:3]
        )
        print(f"{event['token_index']:3} {event['token']!r:16} {top}")
    problems = []
    if len(tokens) != answer["usage"]["completion_tokens"]:
        problems.append(f"{len(tokens)} token events for {answer['usage']['completion_tokens']}")
    if "".join(event["token"] for event in tokens) != text:
        problems.append("the token events do not add up to the chat's text")
    # The last token is sampled and never run through the model, so it has no features.
    bare = [e["token_index"] for e in tokens[:-1] if not e["top_features"] and not e.get("sink")]
    if bare:
        problems.append(f"tokens {bare} have no features")
    print("check failed: " + "; ".join(problems) if problems else "check passed")
    return 1 if problems else 0


def wait_ready(url: str, server_pid: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.kill(server_pid, 0)
            if httpx.get(url, timeout=5).status_code == 200:
                return True
        except ProcessLookupError:
            return False
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    return False


def finished_trace(features: str, request_id: str) -> list[dict]:
    for _ in range(100):
        response = httpx.get(f"{features}/v1/requests/{request_id}", timeout=10)
        if response.status_code == 200 and response.json()["choices"][0]["finished"]:
            return response.json()["choices"][0]["events"]
        time.sleep(0.1)
    raise SystemExit(f"check failed: no finished trace of {request_id} on {features}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
