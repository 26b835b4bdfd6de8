"""What is around the answers of the server on transformers: keys, origins, queue, faults, ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.access import SECRET_HEADER
from tests.support.served import (
    NO_VLLM,
    Served,
    bin_path,
    environment,
    free_port,
    start_transformers,
)
from tests.vllm.shapes.asking import CHAT, COMPLETION, Api

LONG = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
SHORT = {"prompt": "y", "max_tokens": 2}
KEY = "a-key"


def until(condition: Any, timeout: float = 30) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def queue(api: Api) -> list[str]:
    return httpx.get(f"{api.served.chat}/load").json()["queue"]


def test_who_waits_is_told_how_many_are_before_it(api: Api) -> None:
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(api.post, COMPLETION, LONG, "first", timeout=120)
        until(lambda: queue(api))
        second = pool.submit(api.post, COMPLETION, SHORT, "second", timeout=120)
        until(lambda: len(queue(api)) == 2)
        url, lines = f"{api.served.chat}{COMPLETION}", []
        body = {"model": "tiny", **SHORT, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=120) as third:
            assert third.headers["x-queue-ahead"] == "2"
            assert [name[: name.index("-", 5)] for name in queue(api)[:2]] == [
                "cmpl-first",
                "cmpl-second",
            ]
            lines = list(third.iter_lines())
        assert lines[0] == ": queued, 2 before this request"
        assert first.result().json()["usage"]["completion_tokens"] == 400
        assert second.result().headers["x-queue-ahead"] == "1"
    assert lines[-2] == "data: [DONE]"
    assert queue(api) == []


def test_who_leaves_while_it_waits_is_not_run(api: Api) -> None:
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(api.post, COMPLETION, LONG, "runs", timeout=120)
        until(lambda: queue(api))
        with pytest.raises(httpx.ReadTimeout):
            api.post(COMPLETION, SHORT, "leaves", timeout=0.3)
        until(lambda: len(queue(api)) == 1)
        assert running.result().status_code == 200
    (trace,) = api.served.trace("cmpl-leaves")
    done = trace["events"][-1]
    assert (done["finish_reason"], done["completion_tokens"]) == ("abort", 0)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
        (COMPLETION, {"prompt": "x", "model": "other"}, 404, "model"),
        (COMPLETION, {"prompt": "x", "n": 2, "temperature": 0}, 400, "n"),
        (COMPLETION, {"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
        (COMPLETION, {"prompt": [1, "x"]}, 400, "prompt"),
        (COMPLETION, {"prompt": "x", "logprobs": 99}, 400, "logprobs"),
        (COMPLETION, {"prompt": "x" * 10**7}, 400, "input_text"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"9" * 5000: 1}}, 400, "logit_bias"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}],
                "chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}, 400,
         "chat_template_kwargs"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
         400, "messages"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
        (COMPLETION, {"prompt": "x", "response_format": {"type": "json_object"}}, 400,
         "response_format"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"5": 1e9}}, 400, "logit_bias"),
        (COMPLETION, {"prompt": "x", "stream_options": {"include_usage": True}}, 400,
         "stream_options"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400,
         "top_logprobs"),
        (COMPLETION, {"prompt": "x", "seed": 1 << 70}, 400, "seed"),
        (COMPLETION, {"prompt": "x", "n": 10**7}, 400, "n"),
        (COMPLETION, {"prompt": "x", "vllm_xargs": {"neuroscope": "{"}}, 400, "vllm_xargs"),
        (COMPLETION, {"prompt": "x", "vllm_xargs": {"steer": 1}}, 400, "vllm_xargs"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_refused_by_name(
    api: Api, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    answer = api.post(path, body, timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param)
    assert error["message"]


def test_a_body_that_is_no_request(api: Api) -> None:
    bodies = [b"", b"{", b"[]", b"\xff", b"3"]
    for half in ('"prompt": "\\ud800"', '"\\ud800": 1', '"vllm_xargs": {"neuroscope_\\ud800": 1}'):
        bodies.append(f'{{"model": "tiny", "prompt": "x", {half}}}'.encode())
    # How deep Python's parser goes depends on what calls it.
    bodies += [b'{"deep": ' + b"[" * n + b"]" * n + b"}" for n in range(940, 1000, 4)]
    bodies.append(b'{"model": "tiny", "prompt": "x", "temperature": Infinity, "min_tokens": 2}')
    for content in bodies:
        answer = httpx.post(
            f"{api.served.chat}{COMPLETION}",
            content=content,
            headers={"content-type": "application/json"},
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)


def test_what_is_not_served_says_what_is(api: Api) -> None:
    for path in ("/v1/responses", "/load_model", "/reset", "/v1/audio/transcriptions"):
        answer = httpx.post(f"{api.served.chat}{path}", json={})
        assert (answer.status_code, CHAT in answer.json()["error"]["message"]) == (404, True)
    (model,) = httpx.get(f"{api.served.chat}/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 1024)
    assert httpx.get(f"{api.served.chat}/health").status_code == 200


def test_a_seed_is_the_same_answer_again_and_none_is_not(api: Api) -> None:
    drawn = {"prompt": "once", "max_tokens": 24, "temperature": 1.0}

    def text(**more: Any) -> str:
        return api.post(COMPLETION, {**drawn, **more}, timeout=60).json()["choices"][0]["text"]

    assert text(seed=5) == text(seed=5) != text(seed=6)
    assert text() != text()


# A server of their own


@pytest.fixture(scope="module")
def guarded(
    tiny_llama: Path, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    server = start_transformers(
        tiny_llama,
        tiny_sae,
        tmp_path_factory.mktemp("guarded") / "log",
        server_flags=("--served-model-name", "tiny", "--api-key", KEY, "--max-model-len", "512",
                      "--allowed-origins", '["http://page.example"]'),
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "support" / "no_room")},
    )  # fmt: skip
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def ask(served: Served, key: str | None = KEY, **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key is not None else {}
    url = f"{served.chat}{COMPLETION}"
    return httpx.post(url, json={"model": "tiny", **SHORT, **body}, headers=headers, timeout=60)


def test_a_key_is_asked_for(guarded: Served) -> None:
    assert ask(guarded).status_code == 200
    for key in (None, "another", KEY + "x"):
        refused = ask(guarded, key)
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
    for path in ("/v1/models", "/load"):
        assert httpx.get(guarded.chat + path).status_code == 401
    # No ids: who knows one reads that request, with a key as its own user.
    load = httpx.get(f"{guarded.chat}/load", headers={"Authorization": f"Bearer {KEY}"})
    assert load.json().keys() == {"server_load"}
    assert httpx.get(f"{guarded.chat}/health").status_code == 200
    # Through the features port it is the client's own that counts.
    url = f"{guarded.features}{COMPLETION}"
    body = {"model": "tiny", **SHORT}
    assert httpx.post(url, json=body).status_code == 401
    passed = httpx.post(url, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    assert passed.status_code == 200
    children = Path(f"/proc/{guarded.process.pid}/task/{guarded.process.pid}/children")
    for child in children.read_text().split():  # a command line is everybody's to read
        assert KEY not in Path(f"/proc/{child}/cmdline").read_text()


@pytest.mark.parametrize("path", ["/health", "/version"])
def test_a_cookie_that_python_unquotes_for_seconds_holds_nobody_up(
    guarded: Served, path: str
) -> None:
    began = time.monotonic()
    cookie = {"Cookie": 'other="' + "\\" * 60_000 + '"'}
    assert httpx.get(guarded.chat + path, headers=cookie, timeout=60).status_code == 200
    assert time.monotonic() - began < 4  # 7 s and more, if it is read


def test_its_keys_and_secrets_guard_features_too(guarded: Served) -> None:
    secret, name = "a-secret-of-one-stream", {"X-Request-Id": "hidden"}
    xargs = {"neuroscope": json.dumps({"stream_secret": secret})}
    headers = {"authorization": f"Bearer {KEY}"}
    url, body = f"{guarded.chat}{COMPLETION}", {"model": "tiny", **SHORT, "vllm_xargs": xargs}
    assert httpx.post(url, json=body, headers=headers | name, timeout=60).status_code == 200
    trace = f"{guarded.features}/v1/requests/hidden"
    assert httpx.get(trace).status_code == 401
    assert httpx.get(trace, headers=headers).status_code == 404
    shown = {SECRET_HEADER: secret}
    until(lambda: httpx.get(trace, headers=headers | shown).status_code == 200)
    answer = httpx.get(trace, headers=shown)
    assert answer.json()["choices"][0]["request_id"] == "cmpl-hidden"
    assert secret not in guarded.log.read_text()
    until(lambda: "watch: curl" in guarded.log.read_text())  # the banner has a key
    assert "layer 20" in guarded.log.read_text()


def test_pages_elsewhere_may_read_if_they_are_named(guarded: Served) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x"}

    def preflight(origin: str) -> httpx.Response:
        return httpx.options(f"{guarded.chat}{CHAT}", headers={**asked, "origin": origin})

    allowed = preflight("http://page.example")
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    assert "access-control-allow-credentials" not in allowed.headers
    assert "access-control-allow-origin" not in preflight("http://other.example").headers


@pytest.mark.parametrize("stream", [False, True])
def test_no_room_is_an_error_and_the_server_lives(guarded: Served, stream: bool) -> None:
    """`no_room` has prompts of 300 tokens and more not fit."""
    refused = ask(guarded, prompt=[7] * 300, stream=stream)
    said = refused.text
    if stream:
        assert said.rstrip().endswith("data: [DONE]")
        said = next(line for line in said.splitlines() if "error" in line).removeprefix("data: ")
    error = json.loads(said)["error"]
    assert error["code"] == 503
    assert "out of memory on a prompt of 300 tokens" in error["message"]
    assert ask(guarded).status_code == 200


def test_ctrl_c_ends_both_servers(guarded: Served) -> None:
    """The last that asks anything of `guarded`."""
    key = {"authorization": f"Bearer {KEY}"}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, guarded, **LONG)
        until(lambda: httpx.get(f"{guarded.chat}/load", headers=key).json()["server_load"])
        os.kill(guarded.process.pid, signal.SIGINT)
        assert guarded.process.wait(30) == 130
        running.exception(60)
    for port in (guarded.port, guarded.features_port):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [bin_path("neuroscope"), *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(env),
    )


def test_what_is_wrong_at_the_start_is_one_sentence(
    api: Api, tiny_llama: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    serve = ("serve", str(tiny_llama), "--sae", str(tiny_sae), "--backend", "transformers")
    free = ("--port", str(free_port()), "--features-port", str(free_port()))
    cases = {
        "port": ((*serve, "--port", str(api.served.port)), "choose another with --port"),
        "features port": (
            (*serve, *free[:2], "--features-port", str(api.served.features_port)),
            "features port",
        ),
        "device": ((*serve, *free, "--device", "mps"), "device mps is not there"),
        "flag": ((*serve, *free, "--", "--max-num-seqs", "4"), "known are --host"),
        "no port": ((*serve, "--port", "99999"), "99999 is not in the range"),
        "origins": ((*serve, *free, "--", "--allowed-origins", "5"), "no JSON list of origins"),
        "length": ((*serve, *free, "--", "--max-model-len", "99999999"), "--max-model-len is"),
        "model": (
            ("serve", str(tmp_path), "--sae", str(tiny_sae), "--backend", "transformers", *free),
            "can not be loaded with transformers",
        ),
        "folder": (
            ("serve", "./none", "--sae", str(tiny_sae), "--backend", "transformers", *free),
            "./none is no folder",
        ),
        "vLLM's": (("serve", "m", "--sae", "s", "--device", "cpu"), "--device is for --backend"),
    }
    for name, (words, says) in cases.items():
        done = command(*words)
        assert done.returncode != 0, name
        assert says in " ".join(done.stderr.split()), (name, done.stderr)
        assert "Traceback" not in done.stderr, name


def test_without_vllm(
    tiny_llama: Path, tiny_sae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs none works, as does the server of `api`; the rest says what to install, or use."""
    assert command("--help", **NO_VLLM).returncode == 0
    ours = ("--sae", str(tiny_sae), "--backend", "transformers")
    found = command("inspect", "a text", "--model", str(tiny_llama), *ours, "--json", **NO_VLLM)
    assert json.loads(found.stdout), found.stderr
    text = tmp_path / "text.txt"
    text.write_text("a text")
    corpus = ("--corpus", str(text), "--output", str(tmp_path / "c.safetensors"))
    refused = command("calibrate", str(tiny_llama), *ours[:2], *corpus, **NO_VLLM)
    assert refused.returncode == 1
    assert "use --backend transformers" in " ".join(refused.stderr.split())
    # There is no `vllm` beside this Python, nor on the path.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    served = CliRunner().invoke(main, ["serve", str(tiny_llama), *ours[:2]])
    assert (served.exit_code, "use --backend transformers" in served.output) == (1, True)


@pytest.mark.parametrize("missing", ["transformers", "openai"])
def test_without_what_the_server_stands_on(
    missing: str, tiny_llama: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    free = ("--port", str(free_port()), "--features-port", str(free_port()))
    words = ("serve", str(tiny_llama), "--sae", str(tiny_sae), "--backend", "transformers", *free)
    done = command(*words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("neuroscope: transformers' server can not be imported")
    assert "neuroscope-vllm[hf]" in done.stderr
