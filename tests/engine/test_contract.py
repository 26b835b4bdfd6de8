"""What every `Engine` does: the fake, transformers and vLLM, against transformers and SAELens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sae_lens
import torch
from transformers import AutoModelForCausalLM

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.passes import CalibrationPass, FeaturePass, TokenFeatures
from neuroscope_vllm.engine.protocol import Engine
from neuroscope_vllm.engine.spec import EngineSpec
from tests.support.fake_passes import FakePasses, residual_of
from tests.support.patch_process import EngineElsewhere

LAYER = 20
# Prompts arrive in pieces, and a window is shorter than some of them.
VLLM_FLAGS = ("--max-num-batched-tokens", "96", "--max-num-seqs", "24", "--dtype", "float32",
              "--enforce-eager")  # fmt: skip
_pick = random.Random(3)
SEQUENCES = [
    [7],
    [9, 9, 9, 9],
    *([_pick.randrange(300) for _ in range(n)] for n in (130, 1, 40, 255, 3)),
    [9, 9, 9, 9],
]


@pytest.fixture(scope="module", params=["fake", "transformers", "vllm"])
def engine(request: pytest.FixtureRequest, tiny_gemma2: Path, tiny_sae: Path) -> Iterator[Engine]:
    settings = Settings(sae=[str(tiny_sae)])
    if request.param == "fake":
        yield FakePasses(tiny_gemma2, settings)
        return
    spec = EngineSpec(
        model=str(tiny_gemma2),
        settings=settings,
        backend=request.param,
        max_tokens=256,
        vllm_flags=VLLM_FLAGS if request.param == "vllm" else (),
    )
    made = EngineElsewhere(spec) if request.param == "vllm" else spec.open()
    yield made
    made.close()


@pytest.fixture(scope="module")
def listed(engine: Engine) -> TokenFeatures:
    return FeaturePass.read(engine.run(FeaturePass(), SEQUENCES)[LAYER])


def test_it_says_what_it_is(engine: Engine, tiny_gemma2: Path, tiny_sae: Path) -> None:
    assert engine.model == str(tiny_gemma2)
    assert engine.identity
    assert list(engine.sites) == [LAYER]
    assert engine.sites[LAYER].source == str(tiny_sae)
    assert engine.sae_input == "raw"
    assert engine.max_tokens >= 255
    ids = engine.tokenizer.encode("a few words")
    assert "a few words" in engine.tokenizer.decode(ids)


def test_every_token_is_seen_once_and_in_order(listed: TokenFeatures) -> None:
    told = zip(*(column.tolist() for column in listed[:3]), strict=True)
    assert list(told) == [
        (number, position, token)
        for number, sequence in enumerate(SEQUENCES)
        for position, token in enumerate(sequence)
    ]


def test_features_are_what_saelens_makes_of_transformers_residuals(
    engine: Engine, listed: TokenFeatures, tiny_gemma2: Path, tiny_sae: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_gemma2, dtype=torch.float32)
    sae = sae_lens.SAE.load_from_disk(str(tiny_sae))
    row = flips = 0
    for sequence in SEQUENCES:
        if engine.identity == "fake":
            residual = residual_of(sequence, 64)
        else:
            with torch.no_grad():
                hidden = model(torch.tensor([sequence]), output_hidden_states=True)
            residual = hidden.hidden_states[LAYER + 1][0]
        expected = sae.encode(residual).detach()
        for position in range(len(sequence)):
            found = torch.zeros(expected.shape[1])
            begin, end = listed.start[row : row + 2].tolist()
            found[listed.feature[begin:end]] = listed.activation[begin:end]
            both = (found > 0) & (expected[position] > 0)
            torch.testing.assert_close(found[both], expected[position][both], rtol=1e-3, atol=1e-2)
            flips += int(((found > 0) != (expected[position] > 0)).sum())
            row += 1
    assert flips <= 1e-4 * len(listed.feature)  # within rounding of a threshold


def test_the_same_again_is_the_same_to_the_bit(engine: Engine) -> None:
    assert engine.run(FeaturePass(), SEQUENCES) == engine.run(FeaturePass(), SEQUENCES)


def test_a_pass_knows_nothing_of_the_one_before(engine: Engine, listed: TokenFeatures) -> None:
    what = CalibrationPass(special_ids=[9])
    found = CalibrationPass.read(engine.run(what, SEQUENCES)[LAYER])
    ordinary = sum(token != 9 for sequence in SEQUENCES for token in sequence)
    assert found.tokens + found.sinks == ordinary
    counted = (listed.token_id != 9).repeat_interleave(listed.start.diff())
    fired = torch.bincount(listed.feature[counted], minlength=found.width)
    assert torch.equal(found.firings, fired)


def test_chunks_come_one_after_another(engine: Engine) -> None:
    chunks = [SEQUENCES[:2], SEQUENCES[2:5], SEQUENCES[5:]]
    made: list[FeaturePass] = []

    def what() -> FeaturePass:
        made.append(FeaturePass())
        return made[-1]

    found = [FeaturePass.read(one[LAYER]) for one in engine.run_each(what, chunks)]
    assert len(made) == len(chunks)
    for chunk, one in zip(chunks, found, strict=True):
        assert one.token_id.tolist() == [token for sequence in chunk for token in sequence]
