"""A vLLM plugin under which our activation hook writes nothing.

As when a compiled model lacks the op. Put this folder on PYTHONPATH.
"""

import torch

import neuroscope_vllm.engine.vllm.hook  # noqa: F401  (defines the op)

_library = torch.library.Library("neuroscope", "IMPL")


def register() -> None:
    # A kernel for the device goes before the one for all devices that the hook registers.
    if not torch._C._dispatch_has_kernel_for_dispatch_key("neuroscope::observe", "CPU"):
        _library.impl("observe", lambda hidden, residual, buffer: None, "CPU")
