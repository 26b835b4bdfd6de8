"""What every `PatchEngine` does, against plain transformers with a forward hook."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.patching.swap import Replacement
from neuroscope_vllm.engine.protocol import PatchEngine
from neuroscope_vllm.engine.spec import Backend, EngineSpec
from tests.support.models import write_tiny_model
from tests.support.patch_process import Elsewhere
from tests.support.patching import Plain

BACKENDS: tuple[Backend, ...] = ("transformers", "vllm")
# Prompts arrive in pieces.
VLLM_FLAGS = ("--max-num-batched-tokens", "96", "--max-num-seqs", "24")
LAYERS = (0, 3, 5)
TOKENS = (7, 100, 300)
# The first three begin alike; lengths differ, one is a single token.
START = list(range(20, 31))
SEQUENCES = [
    [*START, 40, 41, 42],
    [*START, 50],
    [*START, 60, 61, 62, 63, 64, 65],
    [70],
    [80, *START[1:]],
]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2's window is shorter than some of the sequences."""
    window = {"sliding_window": 8} if request.param == "gemma2" else {}
    folder = tmp_path_factory.mktemp("patched") / request.param
    return write_tiny_model(folder, request.param, layers=6, **window)


@pytest.fixture(scope="module")
def plain(folder: Path, one_thread: None) -> Plain:
    return Plain(folder)


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[PatchEngine]:
    here = request.param == "transformers"
    spec = EngineSpec(
        model=str(folder),
        settings=Settings(),
        backend=request.param,
        vllm_flags=() if here else VLLM_FLAGS,
    )
    engine = spec.open_patching() if here else Elsewhere(spec)
    yield engine
    engine.close()


def replacements(number: int, length: int) -> list[Replacement]:
    """None for some; for others one, or several at several layers."""
    draw = torch.Generator().manual_seed(number)
    places = [(3, length - 1), (0, 0), (5, length // 2), (3, length // 2)][: number % 4]
    return [
        Replacement(layer, position, torch.randn(64, generator=draw) * 3)
        for layer, position in dict.fromkeys(places)
    ]


def test_its_shape(engine: PatchEngine) -> None:
    assert (engine.num_layers, engine.d_model) == (6, 64)
    assert engine.max_tokens >= 64
    assert engine.tokenizer.decode(engine.tokenizer.encode(" Paris")) == " Paris"


def test_residuals_are_those_of_transformers(engine: PatchEngine, plain: Plain) -> None:
    found = engine.residuals(SEQUENCES, LAYERS)
    assert len(found) == len(SEQUENCES)
    for sequence, by_layer in zip(SEQUENCES, found, strict=True):
        assert set(by_layer) == set(LAYERS)
        expected = plain.residuals(sequence)
        for layer, residual in by_layer.items():
            assert (residual.dtype, residual.shape) == (torch.float32, (len(sequence), 64))
            torch.testing.assert_close(residual, expected[layer], atol=1e-4, rtol=1e-4)


def test_patched_runs_are_those_of_a_forward_hook(engine: PatchEngine, plain: Plain) -> None:
    many = [SEQUENCES[i % len(SEQUENCES)] for i in range(40)]
    edits = [replacements(i // 3, len(sequence)) for i, sequence in enumerate(many)]
    assert {len(own) for own in edits} == {0, 1, 2, 3, 4} - {4}
    found = engine.patched(many, edits, TOKENS)
    assert (found.dtype, found.shape) == (torch.float32, (40, len(TOKENS)))
    expected = [plain.next(s, own)[list(TOKENS)] for s, own in zip(many, edits, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-3, rtol=0)
    # They are no small matter.
    changed = [i for i, own in enumerate(edits) if own]
    unpatched = engine.patched(many, [()] * len(many), TOKENS)
    assert (found - unpatched)[changed].abs().amax(dim=1).median() > 0.1


def test_more_than_fits_a_batch(engine: PatchEngine, plain: Plain) -> None:
    long = [(7 * at) % 400 + 10 for at in range(500)]
    other = [*long[:450], *range(50)]
    edit = replacements(1, 400)
    sequences, edits = [long, other] * 4, [edit, []] * 4
    found = engine.patched(sequences, edits, TOKENS)
    expected = torch.stack([plain.next(long, edit), plain.next(other, [])])[:, list(TOKENS)]
    torch.testing.assert_close(found, expected.repeat(4, 1), atol=1e-3, rtol=0)


def test_all_of_another_run_is_that_run_and_its_own_is_nothing(engine: PatchEngine) -> None:
    into, source = [*START, 40, 41], [*START[:4], 99, *START[5:], 40, 41]
    own, other = engine.residuals([into, source], LAYERS)
    ends = engine.patched([into, source], [(), ()], TOKENS)
    assert (ends[0] - ends[1]).abs().max() > 0.05
    edits = [
        [Replacement(layer, at, run[layer][at]) for at in range(len(into))]
        for run in (own, other)
        for layer in LAYERS
    ]
    found = engine.patched([into] * len(edits), edits, TOKENS)
    torch.testing.assert_close(found, ends.repeat_interleave(len(LAYERS), 0), atol=1e-3, rtol=0)


def test_what_runs_share_leaks_nowhere(engine: PatchEngine, plain: Plain) -> None:
    """One prompt patched at its start, middle and end, and not at all, each more than once."""
    prompt = [(11 * at) % 400 + 10 for at in range(70)]
    draw = torch.Generator().manual_seed(0)
    one, other = (3 * torch.randn(64, generator=draw) for _ in range(2))
    edits = [
        [], [Replacement(3, 40, one)], [Replacement(3, 40, other)], [Replacement(1, 40, one)], [],
        [Replacement(3, 40, one)], [Replacement(0, 69, one)], [Replacement(0, 0, one)],
        [Replacement(3, 40, one), Replacement(3, 41, other)], [Replacement(3, 40, one)], [],
    ]  # fmt: skip
    expected = torch.stack([plain.next(prompt, own)[list(TOKENS)] for own in edits])
    assert len({round(float(row[0]), 4) for row in expected}) == len(edits) - 4
    alone: list[torch.Tensor] = []
    cached = [engine.value("cached_tokens")] if isinstance(engine, Elsewhere) else []
    for own in edits:
        alone.append(engine.patched([prompt], [own], TOKENS))
        if isinstance(engine, Elsewhere):
            cached.append(engine.value("cached_tokens"))
    torch.testing.assert_close(torch.cat(alone), expected, atol=1e-4, rtol=0)
    if isinstance(engine, Elsewhere):
        # Blocks of 32, up to that of the first replacement; with the same ones, those after too.
        # Of sliding windows vLLM keeps some blocks only once it has seen what prompts share.
        first = 32 if engine.model.endswith("llama") else 0
        served = [now - before for before, now in itertools.pairwise(cached)]
        assert served == [0, first, 32, 32, 64, 64, 64, 0, 32, 64, 64]
    together = engine.patched([prompt] * len(edits), edits, TOKENS)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    found = engine.residuals([prompt], [3])[0][3]
    torch.testing.assert_close(found, plain.residuals(prompt)[3], atol=1e-4, rtol=1e-4)


def test_what_vllm_can_not_patch_is_said(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "qwen2", "qwen2", layers=2)
    spec = EngineSpec(model=str(folder), settings=Settings(), backend="vllm")
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM .*; use --backend transformers\.$"):
        Elsewhere(spec)
