"""Where a model runs and in which precision, on machines that this one is not."""

from __future__ import annotations

import pytest
import torch

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.engine.hf.device import is_out_of_memory, place

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Machine:
    """What torch says of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def has(self, *devices: str, macos: int = 14) -> None:
        for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
            self._patch.setattr(module, "is_available", lambda name=name: name in devices)
        self._patch.setattr(torch.backends.mps, "is_built", lambda: "mps" in devices)
        self._patch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def chosen(device: str, dtype: str, checkpoint: torch.dtype | None, kind: str = "llama") -> tuple:
    found = place(device, dtype, checkpoint=checkpoint, model_type=kind)
    return found.device.type, found.dtype, bool(found.note)


@pytest.mark.parametrize(
    ("devices", "checkpoint", "expected"),
    [
        ((), BF16, ("cpu", FP32, False)),
        ((), FP16, ("cpu", FP32, False)),
        (("mps",), BF16, ("mps", BF16, False)),
        (("mps",), FP16, ("mps", FP16, False)),
        (("mps",), torch.float64, ("mps", FP32, False)),
        (("mps",), None, ("mps", FP32, False)),
        (("cuda",), BF16, ("cuda", BF16, False)),
        (("cuda", "mps"), FP32, ("cuda", FP32, False)),
    ],
)
def test_auto(
    machine: Machine, devices: tuple[str, ...], checkpoint: torch.dtype | None, expected: tuple
) -> None:
    machine.has(*devices)
    assert chosen("auto", "auto", checkpoint) == expected


def test_what_a_device_or_a_model_can_not_is_float32_and_said(machine: Machine) -> None:
    machine.has("mps", macos=13)
    assert chosen("auto", "auto", BF16) == ("mps", FP32, True)
    machine.has("cuda")
    assert chosen("auto", "auto", FP16, "gemma2") == ("cuda", FP32, True)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("mps", "auto"), "use cpu"),
        (("cuda", "auto"), "device cuda is not there"),
        (("gpu", "auto"), "devices are auto, mps, cuda, cpu"),
        (("cpu", "float64"), "dtypes auto, float32"),
    ],
)
def test_what_is_not_there_is_refused(machine: Machine, asked: tuple[str, str], says: str) -> None:
    machine.has()
    with pytest.raises(ConfigError, match=says):
        place(*asked, checkpoint=BF16, model_type="llama")


def test_a_precision_that_would_be_false_is_refused(machine: Machine) -> None:
    machine.has("mps", macos=13)
    with pytest.raises(ConfigError, match="macOS 14"):
        place("mps", "bfloat16", checkpoint=BF16, model_type="llama")
    with pytest.raises(ConfigError, match="gemma2 overflows"):
        place("cpu", "float16", checkpoint=BF16, model_type="gemma2")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 GB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


@pytest.mark.skipif(
    not torch.backends.mps.is_available(),
    reason="needs a Mac: run `tests/run.sh tests/hf/test_device.py` there",
)
@pytest.mark.mps
def test_the_demo_on_mps_is_the_demo_on_a_cpu() -> None:
    """Whole sequences through the engine, and the same features in float32."""
    from neuroscope_vllm.cli.demo import demo_model, demo_sae
    from neuroscope_vllm.core.config import Settings
    from neuroscope_vllm.core.passes import FeaturePass
    from neuroscope_vllm.engine.hf.engine import HFEngine

    settings = Settings(sae=[str(demo_sae())])
    found = []
    for device in ("cpu", "mps"):
        engine = HFEngine(str(demo_model()), settings, device, "float32")
        ids = engine.tokenizer.encode("The capital of France is Paris, and it lies on the Seine.")
        found.append(FeaturePass.read(engine.run(FeaturePass(), [ids])[20]))
        engine.close()
    on_cpu, on_mps = found
    assert torch.equal(on_cpu.feature, on_mps.feature)
    torch.testing.assert_close(on_mps.activation, on_cpu.activation, rtol=1e-3, atol=1e-2)
