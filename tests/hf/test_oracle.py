"""The oracle against transformers' own hidden states, and its refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.engine.hf.oracle import Oracle

IDS = [2, 40, 41, 300, 17, 17, 99]


@pytest.fixture(params=["tiny_llama", "tiny_gemma2"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_residuals_are_transformers_hidden_states(model: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        states = hf(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    found = Oracle(str(model), [20, 3]).residuals(IDS)
    assert sorted(found) == [3, 20]
    for layer, residual in found.items():
        assert residual.shape == (len(IDS), 64)
        torch.testing.assert_close(residual, states[layer + 1][0])


def test_the_last_layer_comes_without_the_final_norm(model: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        states = hf(torch.tensor([IDS]), output_hidden_states=True).hidden_states
        residual = Oracle(str(model), [25]).residuals(IDS)[25]
        torch.testing.assert_close(hf.model.norm(residual), states[26][0])
    assert not torch.allclose(residual, states[26][0], rtol=0.1)


def test_layers_above_the_last_one_wanted_do_not_run(tiny_llama: Path) -> None:
    oracle = Oracle(str(tiny_llama), [3])
    assert oracle.num_layers == 26
    assert len(oracle._decoder.layers) == 4


def test_a_context_does_not_depend_on_another(tiny_llama: Path) -> None:
    oracle = Oracle(str(tiny_llama), [20])
    alone = oracle.residuals(IDS)[20]
    oracle.residuals([5, 6, 7])
    torch.testing.assert_close(oracle.residuals([*IDS, 8])[20][:-1], alone)


def test_a_model_that_can_not_be_had(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="give the folder or hub"):
        Oracle(str(tmp_path), [20])
    with pytest.raises(ConfigError, match="has 26 layers but layer 26"):
        Oracle(str(tiny_llama), [26])


def test_without_transformers_it_says_what_to_install(tiny_llama: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from neuroscope_vllm.engine.hf.oracle import Oracle\n"
        f"Oracle({str(tiny_llama)!r}, [20])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'neuroscope-vllm[hf]'" in done.stderr
