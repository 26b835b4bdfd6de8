"""The steer op, on the CPU and as a Triton kernel, does what the formulas say and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuroscope_vllm.core.sae.info import RMS
from neuroscope_vllm.engine.serving import steer_rows
from neuroscope_vllm.engine.vllm import steer_op  # noqa: F401  # defines the op
from tests.support.served import TRITON_CPU
from tests.support.steer_cases import (
    BITS,
    CASES,
    LAYER,
    NORMS,
    Case,
    Op,
    Outcome,
    arguments,
    assert_same,
    beside_broken_rows,
    clamped_to_what_is_there,
    expected,
    just_at_a_threshold,
    run,
)

STEER: Op = torch.ops.neuroscope.steer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other longer than these small sums take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_formulas_say(name: str) -> None:
    case = Case(*CASES[name])
    assert_same(case, run(case, STEER), expected(case))


def test_however_many_rows_at_once_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, None, torch.float32)
    at_once = run(case, STEER)
    monkeypatch.setattr(steer_rows, "_ROWS_AT_ONCE", 3)
    for one, other in zip(at_once, run(case, STEER), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


SAME_BITS = {
    "clamped": clamped_to_what_is_there,
    "threshold": just_at_a_threshold,
    "broken": beside_broken_rows,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("what", SAME_BITS)
@pytest.mark.parametrize("dtype", BITS)
def test_no_bit_changes(what: str, norm: str | None, dtype: torch.dtype) -> None:
    before, after = SAME_BITS[what](STEER, norm, dtype)
    assert torch.equal(before.view(BITS[dtype]), after.view(BITS[dtype]))


KERNEL_CASES = [name for name in CASES if name.endswith("-0")]


def through_triton(file: str) -> None:
    """In a process with Triton's interpreter: run the cases, and write what comes out."""
    from neuroscope_vllm.engine.vllm.steer_kernel import steer as kernel

    torch.set_num_threads(1)
    found = {}
    for name in KERNEL_CASES:
        for kind, tensors in run(Case(*CASES[name]), kernel)._asdict().items():
            found |= {f"{name} {kind} {i}": tensor for i, tensor in enumerate(tensors)}
    for what, compared in SAME_BITS.items():
        for norm in NORMS:
            before, after = compared(kernel, norm, torch.bfloat16)
            found |= {f"{what} {norm} before": before, f"{what} {norm} after": after}
    save_file(found, file)


def compile_for_gpu() -> None:
    """In a process without: to a GPU's machine code, which is stricter, and needs none."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from neuroscope_vllm.engine.vllm import steer_kernel

    fixed = {"IS_RMS": False, "IS_LAYER_NORM": True, "COLUMNS": 4096, "SLOTS": 8}
    types = {"rows": "*i32", "last": "*i32", "met": "*i32", "slots": "*i32"}
    types |= dict.fromkeys(("numbers", "reading", "writing", "activation"), "*fp32")
    types |= dict.fromkeys(("hidden", "residual"), "*bf16")
    for kernel in (steer_kernel._edit, steer_kernel._record):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}
        source = ASTSource(kernel, signature, {n: v for n, v in fixed.items() if n in names})
        compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})


def in_a_process(call: str, folder: Path, **env: str) -> None:
    """With a Triton that takes the CPU for its device."""
    code = f"from {__name__} import *; {call}"
    env = {**os.environ, "PYTHONPATH": str(TRITON_CPU), "TRITON_CACHE_DIR": str(folder), **env}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("triton")
    in_a_process(f"through_triton('{folder}/found')", folder, TRITON_INTERPRET="1")
    return load_file(folder / "found")


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    in_a_process("compile_for_gpu()", tmp_path)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernel_does_what_the_cpu_does(kernel: dict[str, Tensor], name: str) -> None:
    case = Case(*CASES[name])
    found = Outcome(
        *(
            [kernel[f"{name} {kind} {i}"] for i in range(len(case.steps))]
            for kind in Outcome._fields
        )
    )
    assert_same(case, found, run(case, STEER))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("what", SAME_BITS)
def test_the_kernel_changes_no_bit(kernel: dict[str, Tensor], what: str, norm: str | None) -> None:
    before, after = kernel[f"{what} {norm} before"], kernel[f"{what} {norm} after"]
    assert torch.equal(before.view(torch.int16), after.view(torch.int16))


def test_torch_compile_keeps_the_edit() -> None:
    case = Case(0, None, torch.float32)
    step = case.steps[0]

    def layer(hidden: Tensor, residual: Tensor, tables: list[Tensor]) -> Tensor:
        hidden = hidden * 2
        torch.ops.neuroscope.steer(hidden, residual, *tables, None)
        return hidden + residual

    compiled = torch.compile(layer, fullgraph=True)
    outcomes = []
    for function in (layer, compiled):
        tables = case.tables()
        tables.fill_rows(torch.tensor(step.rows, dtype=torch.int32).numpy())
        found = function(step.hidden, step.residual, arguments(tables))
        outcomes.append((found, tables.get_buffer("met"), tables.activation(LAYER)))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(outcomes[0][0], step.hidden * 2 + step.residual)


def test_the_op_is_registered_as_torch_wants_it() -> None:
    case = Case(0, RMS, torch.float32)
    step, tables = case.steps[0], case.tables()
    tables.fill_rows(torch.tensor(step.rows, dtype=torch.int32).numpy())
    given = (step.hidden, step.residual, *arguments(tables), RMS)
    torch.library.opcheck(torch.ops.neuroscope.steer.default, given)
