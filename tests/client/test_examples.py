"""What the examples for other people's clients say is what the server takes. Those that are
programs run in tests/vllm/test_client.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import yaml

from neuroscope_vllm.core.steering.spec import SteeringSpec

EXAMPLES = Path(__file__).parents[2] / "examples"
EDIT = {"op": "add", "feature": 6091, "value": 40}


def test_open_webui_sends_what_the_server_takes():
    """It reads the value as JSON; vLLM takes strings and numbers within."""
    row = re.search(r"\| `vllm_xargs` \| `(.*)` \|", (EXAMPLES / "open_webui.md").read_text())
    assert row is not None
    asked = json.loads(row[1])["neuroscope"]
    assert json.loads(asked) == {"steer": [EDIT]}
    assert msgspec.json.decode(asked, type=SteeringSpec).steer


def test_continue_sends_what_the_server_takes():
    blocks = re.findall(r"```yaml\n(.*?)```", (EXAMPLES / "continue.md").read_text(), re.DOTALL)
    [model] = yaml.safe_load("".join(blocks))["models"]
    assert model["provider"] == "openai"
    extra = model["requestOptions"]["extraBodyProperties"]["vllm_xargs"]
    assert json.loads(extra["neuroscope"]) == {"steer": [EDIT]}
