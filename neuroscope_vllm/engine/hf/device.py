"""Where a model runs with transformers, and in which precision."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from neuroscope_vllm.core.errors import ConfigError

Device = Literal["auto", "mps", "cuda", "cpu"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
_FLOAT16_OVERFLOWS = ("gemma2", "gemma3", "gemma3_text")
"""Model types whose residuals grow past 65,504."""


class Placement(NamedTuple):
    """What was chosen, and `note`, a sentence where it is not what one would expect."""

    device: torch.device
    dtype: torch.dtype
    note: str | None = None

    def __str__(self) -> str:
        """As it decides the numbers."""
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}"


ON_CPU = Placement(torch.device("cpu"), torch.float32)


def place(device: str, dtype: str, *, checkpoint: torch.dtype | None, model_type: str) -> Placement:
    """Where and how to run a model.

    `auto` is CUDA, then MPS, then the CPU, as far as the machine has them; and the checkpoint's own
    dtype, but float32 on a CPU, where it is as fast and exact, and where the device lacks it.

    Args:
        checkpoint: The dtype that the weights are stored in, if that is known.
        model_type: As in the model's config.json.

    Raises:
        ConfigError: The machine has no such device, or the model no such precision.
    """
    if device not in get_args(Device) or dtype not in get_args(DType):
        raise ConfigError(
            f"device {device} with dtype {dtype} is unknown; devices are"
            f" {', '.join(get_args(Device))}, dtypes {', '.join(get_args(DType))}."
        )
    chosen = torch.device(_available(device))
    if dtype != "auto":
        return Placement(chosen, _asked(dtype, chosen, model_type))
    if chosen.type == "cpu" or checkpoint not in (torch.bfloat16, torch.float16):
        return Placement(chosen, torch.float32)
    if checkpoint == torch.float16 and model_type in _FLOAT16_OVERFLOWS:
        return Placement(chosen, torch.float32, f"{model_type} overflows in float16: float32.")
    if checkpoint == torch.bfloat16 and not _has_bfloat16(chosen):
        note = "this macOS has no bfloat16 on MPS (14 has): float32, twice the memory."
        return Placement(chosen, torch.float32, note)
    return Placement(chosen, checkpoint)


def _available(device: str) -> str:
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, there in has.items() if there)
    if not has[device]:
        why = "this PyTorch was built without it" if not _built(device) else "none is found"
        others = " or ".join(name for name, there in has.items() if there)
        raise ConfigError(
            f"device {device} is not there ({why}); use {others}, or leave --device out."
        )
    return device


def _built(device: str) -> bool:
    return torch.backends.mps.is_built() if device == "mps" else torch.backends.cuda.is_built()


def _asked(dtype: str, device: torch.device, model_type: str) -> torch.dtype:
    if dtype == "float16" and model_type in _FLOAT16_OVERFLOWS:
        raise ConfigError(f"{model_type} overflows in float16; use --dtype bfloat16 or float32.")
    if dtype == "bfloat16" and not _has_bfloat16(device):
        raise ConfigError(
            "this macOS has no bfloat16 on MPS; update to macOS 14, or use --dtype float32."
        )
    return getattr(torch, dtype)


def _has_bfloat16(device: torch.device) -> bool:
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no room. MPS and the CPU raise plain RuntimeErrors."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "MPS backend out of memory" in said
        or "Invalid buffer size" in said
        or "can't allocate memory" in said
        or "not enough memory" in said
    )


def free_memory(device: torch.device) -> None:
    """Give back what an allocator keeps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
