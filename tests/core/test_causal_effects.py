"""What ablations do, against transformers with a hook a feature, and where it is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuroscope_vllm.core.causal import Pair
from neuroscope_vllm.core.sae import SAE, load_sae
from neuroscope_vllm.engine.hf.effects import FeatureAblator
from tests.support import models, planted

TEXTS = [[2, 40, 41, 300, 17, 17, 99, 120, 45, 7], [2, 5, 90, 91, 300, 301, 8], [1, 17, 99]]
LOWER, UPPER = 3, 5


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_tiny_model(tmp_path_factory.mktemp("m") / "m", request.param, layers=8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("saes")
    saes = [
        load_sae(models.write_saelens_sae(folder / str(layer), d_model=64, width=32, layer=layer,
                                          scale=0.3, seed=layer))
        for layer in (LOWER, UPPER)
    ]  # fmt: skip
    return Pair(saes[0], saes[1], LOWER, UPPER)


def states(hf: Any, text: list[int], lower: SAE, feature: int | None) -> Tensor:
    """The later layer's residual, with a feature taken out of every ordinary token."""
    ordinary = torch.tensor(text) > 4

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        for at in range(len(text)) if feature is not None else ():
            row = hidden[0, at].clone()
            if ordinary[at]:
                hidden[0, at] = row - lower.encode(row[None])[0, feature] * lower.W_dec[feature]

    handle = hf.model.layers[LOWER].register_forward_hook(hook)
    with torch.no_grad():
        found = hf(torch.tensor([text]), output_hidden_states=True).hidden_states[UPPER + 1][0]
    handle.remove()
    return found[ordinary]


def test_effects_are_those_of_one_hook_a_feature(model: Path, pair: Pair) -> None:
    ablator = FeatureAblator(str(model), pair)
    survey = ablator.survey(TEXTS)
    features = survey.lower.topk(9).indices.tolist()  # more than a batch
    assert int(survey.lower[features].min()) > 0
    found = ablator.measure(TEXTS, features, survey)
    hf = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    clean = torch.cat([states(hf, text, pair.lower, None) for text in TEXTS])
    assert survey.tokens == len(clean)
    pre, active = pair.upper.preactivations(clean)
    assert torch.equal(survey.upper, active.sum(0))
    for row, feature in enumerate(features):
        without = torch.cat([states(hf, text, pair.lower, feature) for text in TEXTS])
        changed, still = pair.upper.preactivations(without)
        wanted = (pre - changed).double().mean(0)
        torch.testing.assert_close(found.preactivation[row], wanted, rtol=1e-3, atol=1e-5)
        fired = torch.where(active, pre, 0.0) - torch.where(still, changed, 0.0)
        torch.testing.assert_close(
            found.activation[row], fired.double().mean(0), rtol=1e-3, atol=1e-5
        )


def test_between_layers_that_do_nothing_effects_are_virtual_weights(tmp_path: Path) -> None:
    model = planted.write_model(tmp_path / "model")
    lower = load_sae(planted.write_sae(tmp_path / "sae"))
    upper = load_sae(
        models.write_saelens_sae(tmp_path / "upper", d_model=planted.D_MODEL, width=20, layer=1)
    )
    ablator = FeatureAblator(str(model), Pair(lower, upper, 0, 1))
    words = [*planted.NUMBERS[:6], *planted.COLOURS[:4], *planted.FRENCH[:6]]
    texts = [ablator.tokenizer.encode(" ".join(words))]
    survey = ablator.survey(texts)
    features = [feature for feature, tokens in enumerate(survey.lower.tolist()) if tokens]
    assert len(features) >= 4
    found = ablator.measure(texts, features, survey)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        rows = hf(torch.tensor(texts), output_hidden_states=True).hidden_states[1][0]
    ordinary = ~torch.isin(torch.tensor(texts[0]), torch.tensor(ablator.tokenizer.all_special_ids))
    mean = lower.encode(rows[ordinary]).mean(0)[features]
    wanted = (mean[:, None] * (lower.W_dec[features] @ upper.W_enc)).double()
    assert survey.tokens == int(ordinary.sum())
    torch.testing.assert_close(found.preactivation, wanted, rtol=1e-3, atol=1e-5)
