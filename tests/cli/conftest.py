"""What tests of several commands share; the servers run a tiny Llama in float32."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from neuroscope_vllm.core.labels import Label, LabelSet
from tests.support.collecting import write_corpus
from tests.support.models import write_calibration
from tests.support.served import SMALL, Served, start_neuroscope

SHIFTED_ROWS = Path(__file__).parent.parent / "support" / "shifted_rows"
# Prompts arrive in pieces beside running decodes, and the prefix cache is on.
FLAGS = (*SMALL, "--enforce-eager", "--max-num-batched-tokens", "96", "--enable-prefix-caching")
SINK_NORM = 15.8
"""Some of the tiny Llama's residuals are larger."""


@pytest.fixture(scope="session")
def labelled_sae(tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SAE, with a label for every other feature, and some tokens that are sinks."""
    folder = tmp_path_factory.mktemp("labelled") / "layer_20"
    shutil.copytree(tiny_sae, folder)
    labels = (Label(index, f"meaning {index}", "someone") for index in range(0, 512, 2))
    LabelSet("someone", labels).save(folder / "labels" / "someone.jsonl")
    write_calibration(folder / "calibration.safetensors", width=512, sink_norm=SINK_NORM)
    return folder


def serve(model: Path, sae: Path, log: Path, **env: str) -> Iterator[Served]:
    server = start_neuroscope(model, sae, log, vllm_flags=FLAGS, env=env)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="package")
def served(
    tiny_llama: Path, labelled_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    yield from serve(tiny_llama, labelled_sae, tmp_path_factory.mktemp("verify") / "right.log")


@pytest.fixture(scope="package")
def shifted(
    tiny_llama: Path, tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("verify") / "shifted.log"
    yield from serve(tiny_llama, tiny_sae, log, PYTHONPATH=str(SHIFTED_ROWS))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models, whose threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def collected_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts.jsonl")
