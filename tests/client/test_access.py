"""Clients of a server that has keys, and of requests that are secret."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from neuroscope_vllm import Client
from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.access import KeyDigests, digest
from neuroscope_vllm.core.errors import ServerError
from neuroscope_vllm.engine.fake import FakeEngine, Script
from tests.server.access import ADMIN, OTHER, SECRET, USER
from tests.server.side import Side, start_side
from tests.server.upstream import Upstream


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    keys = KeyDigests([digest(ADMIN)], [digest(USER)])
    side = start_side(tmp_path_factory.mktemp("keyed"), keys=keys)
    with FakeEngine(side.endpoint, top_k=4) as engine:
        side.wait_armed()
        engine.run("hidden", [1, 2], [3, 4], Script(secret=SECRET))
        with Client(side.base, ADMIN) as admin:
            admin.trace("hidden")
        yield side
    side.process.stop()


def test_a_key_and_a_secret_are_shown(keyed: Side, monkeypatch: pytest.MonkeyPatch):
    with Client(keyed.base, USER, SECRET) as owner:
        assert len(owner.trace("hidden").tokens) == 4
        assert [getattr(event, "request_id", None) for event in owner.stream("hidden")] == [
            "hidden"
        ] * 6
    with Client(keyed.base, USER, OTHER) as stranger, pytest.raises(ServerError, match="not kept"):
        stranger.trace("hidden", wait=0)
    with Client(keyed.base) as nobody, pytest.raises(ServerError, match="needs a key"):
        nobody.describe()
    monkeypatch.setenv("NEUROSCOPE_API_KEY", ADMIN)
    with Client(keyed.base) as admin:
        assert len(admin.trace("hidden").tokens) == 4


def test_what_a_wrapped_client_sends_bears_the_secret(keyed: Side, monkeypatch: Any):
    monkeypatch.setattr("neuroscope_vllm.client.wrap.WAIT_S", 0.0)
    upstream = Upstream()
    bodies: list[Any] = []
    loads = json.loads
    with (
        Client(keyed.base, USER, SECRET) as client,
        openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="x") as plain,
    ):
        plain._client.event_hooks["request"] = [lambda asked: bodies.append(loads(asked.content))]
        chat = client.wrap(plain)
        given = {"vllm_xargs": {"neuroscope": json.dumps({"preset": "calm"}), "other": 1}}
        for extra in ({}, given):
            chat.chat.completions.create(model="m", messages=[], extra_body=extra)
    upstream.server.shutdown()
    upstream.server.server_close()
    first, second = (body["vllm_xargs"] for body in bodies)
    assert loads(first["neuroscope"]) == {"stream_secret": SECRET}
    assert loads(second["neuroscope"]) == {"preset": "calm", "stream_secret": SECRET}
    assert second["other"] == 1
    assert loads(given["vllm_xargs"]["neuroscope"]) == {"preset": "calm"}  # the caller's own


@pytest.mark.parametrize(("key", "code", "said"), [(ADMIN, 0, "Wrote"), (None, 1, "needs a key")])
def test_the_command_line_shows_a_key(
    keyed: Side, tmp_path: Path, key: str | None, code: int, said: str
):
    words = ["export", "hidden", "--url", keyed.base, "--jsonl", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(main, words, env={"NEUROSCOPE_API_KEY": key, "VLLM_API_KEY": None})
    assert done.exit_code == code, done.output
    assert said in done.output
