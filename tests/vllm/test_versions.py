"""A vLLM that is not supported is refused by name, and left alone where we are not configured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.engine.vllm import compat
from tests.support.served import environment
from tests.support.vllm_copy import copy_vllm, rewrite

# vLLM's front process: it loads plugins, then checks its configuration.
SCRIPT = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.worker_base import WorkerWrapperBase

init_device = WorkerWrapperBase.init_device
for additional in json.loads(sys.argv[2]):
    engine_args = EngineArgs(model=sys.argv[1], dtype="float32", additional_config=additional)
    try:
        print("SERVES", engine_args.create_engine_config().additional_config)
    except Exception as refusal:
        print("REFUSED", type(refusal).__name__, refusal)
print("UNTOUCHED", WorkerWrapperBase.init_device is init_device)
"""


def test_another_version_is_refused(tiny_llama: Path, tiny_sae: Path, tmp_path: Path) -> None:
    folder = copy_vllm(tmp_path / "copy")
    version = "__version__ = version = '0.34.0rc1'\n__version_tuple__ = (0, 34, 0, 'rc1')\n"
    rewrite(folder / "vllm" / "_version.py", version)
    given = json.dumps([{}, {"neuroscope": {"sae": str(tiny_sae), "hub": "ipc:///nowhere"}}])
    words = [sys.executable, "-c", SCRIPT, str(tiny_llama), given]
    env = environment({"PYTHONPATH": str(folder)})
    said = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    why = "vLLM 0.34.0rc1 is not supported; neuroscope serves vLLM 0.26 to 0.33, so install one"
    found = ["SERVES {}", f"REFUSED ConfigError {why} of these, or leave neuroscope unconfigured."]
    assert said.stdout.splitlines()[-3:] == [*found, "UNTOUCHED True"], said.stdout + said.stderr


@pytest.mark.parametrize(
    ("version", "served"),
    [
        ((0, 26, 0), True),
        ((0, 33, 0, "rc2"), True),
        ((0, 33, 1, "dev4", "g0123456"), True),
        ((0, 25, 1), False),
        ((0, 34, 0, "rc1"), False),
        ((1, 26, 0), False),
        ((0, 0, "dev"), False),
    ],
)
def test_versions(version: tuple[Any, ...], served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version_tuple__", version)
    if served:
        compat.check_version()
    else:
        with pytest.raises(ConfigError, match=r"^vLLM .* is not supported; .* 0\.26 to 0\.33, so"):
            compat.check_version()
