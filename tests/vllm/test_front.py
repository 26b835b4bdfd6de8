"""What the front process leaves in vLLM's configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuroscope_vllm.core.config import RUNTIME_VARIABLE
from neuroscope_vllm.engine.vllm import plugin
from neuroscope_vllm.engine.vllm.settings import worker_settings
from tests.support import models


@pytest.fixture
def engine_config(tiny_llama: Path) -> Iterator[Any]:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()

    def create(**neuroscope: Any) -> Any:
        additional = {"neuroscope": {"hub": "ipc:///nowhere", **neuroscope}} if neuroscope else {}
        args = EngineArgs(str(tiny_llama), dtype="float32", additional_config=additional)
        return args.create_engine_config()

    yield create
    os.environ.pop(RUNTIME_VARIABLE, None)


def test_compile_cache_depends_on_the_sae_and_not_on_ports(
    engine_config: Any, tiny_sae: Path, tmp_path: Path
) -> None:
    """A cache from a run without the plugin would serve a model without the op."""
    other = models.write_saelens_sae(tmp_path / "other", d_model=64, width=256, layer=7)
    here = {"sae": str(tiny_sae)}
    watched = engine_config(**here).compute_hash()
    assert engine_config(**here, features_port=9999, top_k=3).compute_hash() == watched
    assert engine_config(sae=str(other)).compute_hash() != watched
    assert engine_config().compute_hash() != watched


def test_unconfigured_is_untouched(engine_config: Any) -> None:
    config = engine_config()
    assert config.additional_config == {}
    assert worker_settings(config) is None


def test_eager_mode_is_never_forced(engine_config: Any, tiny_sae: Path) -> None:
    assert engine_config(sae=str(tiny_sae)).model_config.enforce_eager is False


def test_registering_twice_wraps_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    once = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is once
