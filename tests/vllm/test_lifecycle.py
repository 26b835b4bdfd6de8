"""Starting, watching over and ending the two servers, from the outside."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from neuroscope_vllm.core.access import SECRET_HEADER
from neuroscope_vllm.core.labels import Label, LabelSet
from tests.support import models
from tests.support.served import (
    SMALL,
    Served,
    bin_path,
    environment,
    free_port,
    sse_events,
    start_neuroscope,
    start_vllm,
)

EAGER = (*SMALL, "--enforce-eager")
USER, ADMIN, SECRET = "a-key-of-vllm-itself", "an-admin-key-of-ours", "a-secret-of-one-stream"


def side_processes(served: Served) -> list[psutil.Process]:
    return [p for p, words in family(served) if "neuroscope_vllm.server" in words]


def family(served: Served) -> list[tuple[psutil.Process, list[str]]]:
    """All processes of the server, with their command lines."""
    found = []
    for process in psutil.Process(served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found.append((process, process.cmdline()))
    return found


def is_back(served: Served, killed: psutil.Process) -> bool:
    return [p.pid for p in side_processes(served)] not in ([], [killed.pid])


def scheduler_process(served: Served) -> psutil.Process:
    """The process that hands out the steps; the model runs in a child of it."""
    (core,) = [p for p, words in family(served) if "EngineCore" in " ".join(words)]
    return core


def chat(
    served: Served,
    request_id: str,
    url: str | None = None,
    max_tokens: int = 4,
    timeout: float = 120,
) -> str:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    response = httpx.post(
        f"{url or served.chat}/v1/chat/completions",
        json=body,
        headers={**served.headers, "X-Request-Id": request_id},
        timeout=timeout,
    )
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]


def wait_until(condition: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def served(
    tiny_llama: Path, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("lifecycle") / "serve.log"
    flags = (*EAGER, "--shutdown-timeout", "120")
    server = start_neuroscope(tiny_llama, tiny_sae, log, vllm_flags=flags)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def test_banner_names_both_urls_the_sae_the_layer_and_cuda_graphs(
    served: Served, tiny_sae: Path
) -> None:
    wait_until(lambda: "CUDA graphs" in served.log.read_text())
    banner = served.log.read_text()
    for piece in (f":{served.port}/v1", f"{served.features}/", "layer 20", str(tiny_sae)):
        assert piece in banner


def test_pass_through_reaches_vllm(served: Served) -> None:
    assert httpx.get(f"{served.features}/v1/models").json()["data"][0]["id"] == "tiny"
    text = chat(served, "through", url=served.features)
    (trace,) = served.trace("chatcmpl-through")
    tokens = [e["token"] for e in trace["events"] if e["event"] == "token"]
    assert "".join(tokens) == text


def test_a_killed_side_process_comes_back_while_chat_goes_on(served: Served) -> None:
    (side,) = side_processes(served)
    side.kill()
    assert isinstance(chat(served, "meanwhile"), str)
    wait_until(lambda: is_back(served, side))
    served.wait_ready(f"{served.features}/health", timeout=20)
    chat(served, "after")
    (trace,) = served.trace("chatcmpl-after")
    assert [e["event"] for e in trace["events"]].count("token") == 4


def test_what_ended_while_the_side_process_was_away_is_told_by_the_new_one(served: Served) -> None:
    (side,) = side_processes(served)
    side.suspend()
    try:
        text = chat(served, "ended", max_tokens=5)
    finally:
        side.kill()
    (trace,) = served.trace("chatcmpl-ended")
    events = trace["events"]
    tokens = [e for e in events if e["event"] == "token"]
    assert "".join(e["token"] for e in tokens) == text
    assert [e["token_index"] for e in tokens] == list(range(5))
    (gap,) = [e for e in events if e["event"] == "gap"]
    assert (gap["from"], gap["to"]) == (0, tokens[-1]["position"])
    assert (events[-1]["event"], events[-1]["finish_reason"]) == ("done", "length")


def test_a_running_chat_goes_on_in_the_stream_of_the_new_side_process(served: Served) -> None:
    # The test before has killed one: where the worker still looks for the new one, this chat would
    # be over before its first features are there.
    served.wait_ready(f"{served.features}/health", timeout=20)
    (side,) = side_processes(served)
    trace_url = f"{served.features}/v1/requests/survivor"

    def has_features() -> bool:
        time.sleep(0.1)  # for what is on its way
        response = httpx.get(trace_url, timeout=20)
        if response.status_code != 200:
            return False
        events = response.json()["choices"][0]["events"]
        return sum(e["event"] == "token" and e["features_at"] == "self" for e in events) > 5

    with ThreadPoolExecutor(1) as pool:
        scheduler = scheduler_process(served)
        running = pool.submit(chat, served, "survivor", None, 900)
        deadline = time.monotonic() + 60
        try:
            # A few steps at a time, or the chat is over before its features are seen. Then none,
            # until the new side process is there and the worker has found it.
            while scheduler.suspend() or not has_features():
                assert time.monotonic() < deadline
                scheduler.resume()
                time.sleep(0.02)
            assert not running.done()
            side.kill()
            wait_until(lambda: is_back(served, side))
            served.wait_ready(f"{served.features}/health", timeout=20)
        finally:
            scheduler.resume()
        text = running.result(120)
    (trace,) = served.trace("chatcmpl-survivor")
    tokens = [e for e in trace["events"] if e["event"] == "token"]
    assert "".join(e["token"] for e in tokens) == text
    assert [e["token_index"] for e in tokens] == list(range(900))
    (gap,) = [e for e in trace["events"] if e["event"] == "gap"]
    assert gap["reason"] == "dropped"
    lost = range(gap["from"], gap["to"])
    expected = [None if e["position"] in lost else "self" for e in tokens[:-1]]
    assert [e["features_at"] for e in tokens[:-1]] == expected
    assert expected[-1] == "self"


def test_taken_port_stops_the_start_and_names_the_port(
    served: Served, tiny_llama: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    config = {"sae": str(tiny_sae), "features_port": served.features_port}
    second = start_vllm(tiny_llama, tmp_path / "log", neuroscope=config, vllm_flags=EAGER)
    assert second.process.wait(120) not in (0, None)
    lines = [line for line in second.tail().splitlines() if "neuroscope:" in line]
    assert len(lines) == 1
    assert str(served.features_port) in lines[0]
    assert "EngineCore" not in second.log.read_text()


def test_ctrl_c_drains_and_exits_130(served: Served) -> None:
    """Last in this module that uses the shared server: it ends it."""
    family = psutil.Process(served.process.pid).children(recursive=True)
    (side,) = side_processes(served)
    runtime_directory = Path(side.cmdline()[-1]).parent
    assert runtime_directory.is_dir()
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("GET", f"{served.features}/v1/features/stream", timeout=60) as stream,
    ):
        running = pool.submit(chat, served, "drained", None, 400)
        events = sse_events(stream)
        while next(events)["event"] != "token":
            pass
        served.process.send_signal(signal.SIGINT)
        assert isinstance(running.result(120), str)
        ended = time.monotonic()
        heard = list(events)
        assert served.process.wait(20) == 130
        assert time.monotonic() - ended < 30  # 1 to 2, where nothing else runs
    assert (heard[-2]["event"], heard[-2]["finish_reason"]) == ("done", "length")
    assert heard[-2]["completion_tokens"] == 400
    assert (heard[-1]["event"], heard[-1]["reason"]) == ("goodbye", "shutdown")
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert not runtime_directory.exists()


def check_secret(server: Served, side: psutil.Process, family: list[psutil.Process]) -> None:
    """vLLM's key reads what it can name, but for a secret request, whose secret nobody logs."""
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 4, "n": 2, "temperature": 1}
    body["vllm_xargs"] = {"neuroscope": json.dumps({"stream_secret": SECRET})}
    headers = {**server.headers, "X-Request-Id": "hidden"}
    httpx.post(f"{server.chat}/v1/completions", json=body, headers=headers).raise_for_status()
    admin, shown = {"Authorization": f"Bearer {ADMIN}"}, {SECRET_HEADER: SECRET}
    url = f"{server.features}/v1/requests/hidden"
    wait_until(lambda: httpx.get(url, headers=admin).status_code == 200)
    for headers in (admin, shown, server.headers | shown):
        assert len(httpx.get(url, headers=headers).json()["choices"]) == 2
    assert httpx.get(url, headers=server.headers).status_code == 404
    assert httpx.get(url).status_code == 401
    assert httpx.get(f"{server.features}/v1/requests", headers=server.headers).status_code == 403
    log = server.log.read_text()
    assert hashlib.sha256(SECRET.encode()).hexdigest() in log  # in the parameters that vLLM logs
    told = [log, *(" ".join(process.cmdline()) for process in family)]
    told += [str(side.environ()), (Path(side.cmdline()[-1])).read_text()]
    assert not any(one in text for one in (SECRET, ADMIN) for text in told)
    assert USER not in told[-1] + told[-2]


def test_sigterm_without_drain_says_goodbye(
    tiny_llama: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    server = start_vllm(
        tiny_llama, tmp_path / "log", neuroscope={"sae": str(tiny_sae)}, vllm_flags=EAGER
    )
    try:
        server.wait_ready()
        heard = _while_a_chat_runs(server, server.process.terminate)
        assert server.process.wait(30) is not None
    finally:
        server.stop()
    assert heard[-1]["event"] == "goodbye"
    # vLLM kills its engine, in most cases before that could say a word, or lets it end its answer.
    assert {e["finish_reason"] for e in heard if e["event"] == "done"} <= {"abort", "length"}


def _while_a_chat_runs(
    served: Served, fault: Callable[[], object], admin: str = "none"
) -> list[dict[str, Any]]:
    """What readers of everything hear of a long chat and a fault in it, to the stream's end."""
    url, headers = f"{served.features}/v1/features/stream", {"Authorization": f"Bearer {admin}"}
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("GET", url, headers=headers, timeout=60) as stream,
    ):
        # A server without its engine waits for its clients to leave.
        running = pool.submit(chat, served, "struck", None, 900, 20)
        events = sse_events(stream)
        while next(events)["event"] != "token":
            pass
        fault()
        heard = list(events)
        running.exception(60)  # on a fast machine its answer may be whole
        return heard


def test_two_api_servers_share_one_side_process_and_two_layers_one_pass(
    tiny_llama: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    earlier = models.write_saelens_sae(tmp_path / "layer_12", d_model=64, width=256, layer=12)
    (earlier / "labels").mkdir()
    labels = [Label(index=i, text=f"early {i}", labeller="tokens") for i in range(256)]
    LabelSet("tokens", labels).save(earlier / "labels" / "tokens.jsonl")
    server = start_vllm(
        tiny_llama,
        tmp_path / "log",
        neuroscope={"sae": [str(tiny_sae), str(earlier)]},
        vllm_flags=(*EAGER, "--api-server-count", "2", "--api-key", USER, "--enable-log-requests"),
        env={"NEUROSCOPE_ADMIN_KEYS": ADMIN},
    )
    server.key = USER
    family: list[psutil.Process] = []
    try:
        server.wait_ready()
        family = psutil.Process(server.process.pid).children(recursive=True)
        (side,) = side_processes(server)
        for i in range(6):
            chat(server, f"many-{i}")
            (trace,) = server.trace(f"chatcmpl-many-{i}")
            tokens = [e for e in trace["events"] if e["event"] == "token"]
            assert [e["layer"] for e in tokens] == [12, 20] * 4
            for event in tokens[:-2]:
                labels = {f["label"] for f in event["top_features"]}
                assert (None in labels) == (event["layer"] == 20)
        check_secret(server, side, family)
        # vLLM ends itself with its engine, and takes the side process along.
        heard = _while_a_chat_runs(server, scheduler_process(server).kill, ADMIN)
        assert heard[-1]["event"] == "goodbye"
        wait_until(lambda: not side.is_running(), timeout=30)
    finally:
        server.stop()
        for orphan in family:
            with contextlib.suppress(psutil.Error):
                orphan.kill()


def test_unconfigured_vllm_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    server = start_vllm(tiny_llama, tmp_path / "log", vllm_flags=EAGER)
    try:
        server.wait_ready(f"{server.chat}/health")
        assert isinstance(chat(server, "plain"), str)
        assert side_processes(server) == []
        family = [server.process.pid]
        family += [p.pid for p in psutil.Process(server.process.pid).children(recursive=True)]
        listening = {
            c.laddr.port
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.pid in family
        }
        assert server.features_port not in listening
        assert 8081 not in listening
        assert "neuroscope" not in server.log.read_text().replace(str(tmp_path), "")
        assert "Observed" not in server.log.read_text()
    finally:
        server.stop()


def test_print_command_is_the_equivalent_vllm_serve(tiny_sae: Path) -> None:
    words = [bin_path("neuroscope"), "serve", "some/model", "--sae", str(tiny_sae)]
    words += ["--print-command", "--port", str(free_port()), "--", "--max-model-len", "99"]
    printed = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
    assert printed.stdout.startswith("vllm serve some/model --port ")
    assert "--max-model-len 99" in printed.stdout
    assert str(tiny_sae) in printed.stdout
