"""The hook in the decoder loop, and the custom op that lives in the compiled graph.

Under FULL CUDA graphs no Python of the model runs on replay. So the hook is an op that writes a
persistent buffer: allocated once when the model is built, read by `pipeline` after each step,
valid until the next forward pass begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neuroscope_vllm.engine.serving.steer_tables import SteerTables
from neuroscope_vllm.engine.vllm import steer_op  # noqa: F401  # defines the op
from neuroscope_vllm.engine.vllm.replace_op import Replacements
from neuroscope_vllm.engine.vllm.settings import worker_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_library = torch.library.Library("neuroscope", "DEF")
_library.define("observe(Tensor hidden, Tensor residual, Tensor(a!) buffer) -> ()")


def _observe(hidden: Tensor, residual: Tensor, buffer: Tensor) -> None:
    """buffer[:n] = hidden + residual; n <= len(buffer) rows, the step's padded batch."""
    torch.add(hidden, residual, out=buffer[: hidden.shape[0]])


_library.impl("observe", _observe, "CompositeExplicitAutograd")
torch.library.register_fake("neuroscope::observe", lambda hidden, residual, buffer: None)


class ActivationHook(nn.Module):
    """Called after every decoder layer; edits at the observed ones, then keeps resid_post.

    resid_post of a layer is `hidden + residual` as the layer returns them: vLLM adds the MLP
    branch lazily, in the next norm. Both live tensors go into the op, for a sum computed outside
    would be dead code to torch.compile and the buffer would stay zero.
    """

    def __init__(
        self,
        layers: list[int],
        num_rows: int,
        d_model: int,
        dtype: torch.dtype,
        steering: SteerTables | None = None,
        replacements: Replacements | None = None,
    ) -> None:
        super().__init__()
        for layer in layers:
            self.register_buffer(
                _name(layer), torch.zeros(num_rows, d_model, dtype=dtype), persistent=False
            )
        self.layers = layers
        self.steering = steering
        self.replacements = replacements

    @classmethod
    def for_model(cls, vllm_config: VllmConfig, start_layer: int, end_layer: int) -> ActivationHook:
        """The hook of a pipeline stage that owns the layers [start_layer, end_layer)."""
        settings = worker_settings(vllm_config)
        wanted = settings.layers if settings else []
        model = vllm_config.model_config
        layers = [layer for layer in wanted if start_layer <= layer < end_layer]
        num_rows, d_model = max_rows(vllm_config), model.get_hidden_size()
        steering = None
        if settings is not None and settings.steered and layers:
            steering = SteerTables(
                {layer: settings.input_norm(layer) for layer in layers},
                num_rows=num_rows,
                d_model=d_model,
                entries=vllm_config.scheduler_config.max_num_seqs,
            )
        replacements = None
        if settings is not None and settings.patched:
            replacements = Replacements(layers, num_rows, d_model, model.dtype)
        return cls(layers, num_rows, d_model, model.dtype, steering, replacements)

    def forward(self, layer: int, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.steering is not None and layer in self.layers:
            torch.ops.neuroscope.steer(hidden, residual, *self.steering.of_layer(layer))
        if self.replacements is not None:
            self.replacements.replace(layer, hidden, residual)
        buffer = self._buffers.get(_name(layer))
        if buffer is not None:
            torch.ops.neuroscope.observe(hidden, residual, buffer)
        return hidden, residual

    def resid_post(self, layer: int) -> Tensor:
        """[num_rows, d_model], model dtype; rows of the last step, then stale ones."""
        return self.get_buffer(_name(layer))


def max_rows(vllm_config: VllmConfig) -> int:
    """Most rows a forward pass can have, CUDA-graph padding included."""
    capture = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_batched_tokens, capture)


def _name(layer: int) -> str:
    return f"resid_post_{layer}"
