"""Fixtures shared by all tests: a clean environment and the tiny models, built once.

And how `tests/run.sh` without arguments shares them out under pytest-xdist: the tests of a server
go to one worker, slow ones first, and each worker's engines have a core of their own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from neuroscope_vllm.core.artefacts import DATA_VARIABLE
from tests.support import models

# Time says nothing on a machine that also runs vLLM, and a red run should be red again.
hypothesis.settings.register_profile("neuroscope", deadline=None, derandomize=True)
hypothesis.settings.load_profile("neuroscope")

SLOW_FIRST = ("vllm", "hf", "cli", "engine", "client", "server", "deploy", "core")
OF_ONE_SERVER = {"tests/vllm/shapes", "tests/hf/serve"}


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        core = int(worker.removeprefix("gw")) % (os.cpu_count() or 1)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    if item.path.name == "test_ray.py":
        return -1  # Ray reads at its import where to listen, and vLLM imports it too
    folder = item.nodeid.split("/")[1]
    return SLOW_FIRST.index(folder) if folder in SLOW_FIRST else len(SLOW_FIRST)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByServer(config, log)


class _ByServer(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = file.rpartition("/")[0]
        return folder if folder in OF_ONE_SERVER else file


@pytest.fixture(scope="session")
def empty_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where calibrations and labels would be kept, in place of the user's own folder."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True, scope="session")
def _no_data_of_the_user(empty_data: Path) -> None:
    os.environ[DATA_VARIABLE] = str(empty_data)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("NEUROSCOPE_") and n != DATA_VARIABLE]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_tiny_model(tmp_path_factory.mktemp("models") / "gemma2", "gemma2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads layer 20 of the tiny models."""
    folder = tmp_path_factory.mktemp("saes") / "layer_20"
    return models.write_saelens_sae(folder, d_model=64, width=512, layer=20)
