"""Fixtures shared by all tests: a clean environment and the tiny models, built once."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from neuroscope_vllm.core.artefacts import DATA_VARIABLE
from tests.support import models

# Time says nothing on a machine that also runs vLLM, and a red run should be red again.
hypothesis.settings.register_profile("neuroscope", deadline=None, derandomize=True)
hypothesis.settings.load_profile("neuroscope")


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
