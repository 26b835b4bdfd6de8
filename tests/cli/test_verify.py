"""`neuroscope verify` against a real server, one whose rows are shifted, and none at all."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from neuroscope_vllm.core import launch
from tests.server.side import start_side
from tests.support.models import write_tiny_model
from tests.support.served import Served, bin_path

KEYS = [
    "requests",
    "tokens",
    "missing",
    "duplicated",
    "misattributed",
    "wrong_features",
    "worst_relative_error",
]


def verify(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [bin_path("neuroscope"), "verify", "--url", url, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


@pytest.fixture(scope="module")
def verdict(served: Served) -> dict[str, Any]:
    done = verify(served.features, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_right_server_passes(verdict: dict[str, Any]) -> None:
    assert list(verdict) == KEYS
    assert [type(value) for value in verdict.values()] == [int] * 6 + [float]
    assert verdict["requests"] == 32
    assert verdict["tokens"] > 32 * 48
    assert [verdict[name] for name in KEYS[2:6]] == [0] * 4
    assert 0 < verdict["worst_relative_error"] < 1e-3


def test_a_tolerance_below_rounding_finds_faults(served: Served) -> None:
    done = verify(served.features, "--json", "--requests", "8", "--tolerance", "1e-9")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong_features"] > 0
    assert found["missing"] == found["duplicated"] == 0


def test_the_table_says_the_same(served: Served) -> None:
    done = verify(served.features, "--requests", "3", "--max-tokens", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in KEYS:
        assert name.replace("_", " ") in done.stdout


def test_shifted_rows_are_noticed(shifted: Served) -> None:
    assert httpx.get(f"{shifted.features}/health").json()["status"] == "ok"
    done = verify(shifted.features, "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["misattributed"] > found["tokens"] // 4
    assert found["missing"] == found["duplicated"] == 0
    assert found["worst_relative_error"] > 0.5


def test_a_server_that_dies_meanwhile(shifted: Served) -> None:
    words = [bin_path("neuroscope"), "verify", "--url", shifted.features, "--max-tokens", "400"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        url = f"{shifted.features}/v1/features/describe"
        while child.poll() is None and not httpx.get(url).json()["limits"]["readers"]:
            time.sleep(0.2)
        shifted.stop()
        out, err = child.communicate(timeout=120)
    assert child.returncode == 2, err
    assert "Traceback" not in err
    assert "Error: " in err
    assert out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "/no/such/model"), "--model"),
        (("--sae", "/no/such/sae"), "does not exist"),
        (("--sae", "a", "--sae", "b"), "one --sae per layer"),
        (("--max-tokens", "1000"), "smaller --max-tokens"),
        (("--tolerance", "2"), "0<x<1"),
    ],
)
def test_what_can_not_be_checked_is_said(served: Served, words: tuple[str, ...], said: str) -> None:
    expect_refusal(verify(served.features, *words), said)


def test_another_model_than_the_sae_was_made_for(served: Served, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", "llama", d_model=128, layers=21)
    expect_refusal(verify(served.features, "--model", str(other)), "residuals of size 64")


def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        expect_refusal(verify(url), "neuroscope serve")
    expect_refusal(verify("nonsense"), "nonsense")


class Elsewhere(http.server.SimpleHTTPRequestHandler):
    """Some web server that is not ours."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_some_other_server() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        expect_refusal(verify(url), "not a neuroscope server")
        server.shutdown()


def test_a_server_that_is_not_armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.RUNTIME_VARIABLE, "")
    side = start_side(tmp_path)
    try:
        expect_refusal(verify(side.base), "does not observe its model")
    finally:
        side.process.stop()


def expect_refusal(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
