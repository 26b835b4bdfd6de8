"""SAEs as their publishers write them, made small and random, and the publishers' own code."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

D_MODEL, WIDTH, K = 16, 64, 5


def publisher(module: str) -> ModuleType:
    """A module of a publisher's package, without the package's `__init__`s.

    These import trainers, and with them half of the ecosystem; the arithmetic needs none of it.
    The packages ask for GPU builds of torch: `pip install --no-deps eai-sparsify
    dictionary-learning natsort simple-parsing docstring-parser`.
    """
    packages = module.split(".")[:-1]
    for depth in range(1, len(packages) + 1):
        name = ".".join(packages[:depth])
        if name in sys.modules:
            continue
        if depth == 1:
            spec = importlib.util.find_spec(name)
            if spec is None:
                pytest.fail(f"{name} is not installed; run examples/setup.sh VENV demo,dev")
            path = list(spec.submodule_search_locations or ())
        else:
            above = sys.modules[name.rpartition(".")[0]]
            path = [f"{above.__path__[0]}/{packages[depth - 1]}"]
        bare = ModuleType(name)
        bare.__path__ = path
        sys.modules[name] = bare
    return importlib.import_module(module)


def randomise(module: nn.Module, scale: float = 0.3) -> None:
    """Random parameters. Thresholds and gates come out of both signs, which is harder than real."""
    draw = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * scale


def random_tensors(shapes: Mapping[str, tuple[int, ...]], scale: float = 0.3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) * scale for name, shape in shapes.items()}


def rows(n: int = 300, d_model: int = D_MODEL) -> Tensor:
    """[n, d_model], of widely different norms."""
    draw = torch.Generator().manual_seed(1)
    size = torch.rand(n, 1, generator=draw) * 8 + 0.1
    return torch.randn(n, d_model, generator=draw) * size


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-5 of the largest value, and active in the same places."""
    theirs = theirs.detach().float()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert torch.equal(ours != 0, theirs != 0)


def edit_json(path: Path, **changes: object) -> None:
    """Change settings of a JSON object; `...` removes one."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Change tensors of a safetensors file; None removes one."""
    tensors: Mapping[str, Tensor | None] = load_file(path) | changes
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path)
