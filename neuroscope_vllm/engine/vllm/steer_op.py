"""The custom op that edits the residual stream inside the compiled graph: persistent tables that
change between forward passes, never a recapture. `steer_rows` says what it does; CUDA's way, of
the same meaning, is in `steer_kernel`.
"""

from __future__ import annotations

from typing import Any

import torch

from neuroscope_vllm.engine.serving.steer_rows import steer

library = torch.library.Library("neuroscope", "FRAGMENT")
library.define(
    "steer(Tensor(a!) hidden, Tensor residual, Tensor rows, Tensor last, Tensor(b!) met,"
    " Tensor slots, Tensor numbers, Tensor reading, Tensor writing, Tensor(c!) activation,"
    " str? input_norm) -> ()"
)


def _steer_on_cuda(*args: Any) -> None:
    from neuroscope_vllm.engine.vllm import steer_kernel  # Triton, which a CPU build has not

    steer_kernel.steer(*args)


library.impl("steer", steer, "CPU")
library.impl("steer", _steer_on_cuda, "CUDA")
torch.library.register_fake("neuroscope::steer", lambda *args: None)
