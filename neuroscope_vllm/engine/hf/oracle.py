"""The residuals of a token sequence as transformers computes them, one sequence at a time.

An independent reference for what a server streams: float32, on the CPU, eager attention, no cache
and no batching, so none of what makes an inference engine fast can be wrong here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.engine.hf.loading import decoder_layers, load_whole


class Oracle:
    """A transformers model cut off above the last layer that is asked for.

    Attributes:
        num_layers: Decoder layers of the whole model.
        tokenizer: The model's.
    """

    def __init__(self, model: str, layers: Sequence[int]) -> None:
        """
        Args:
            model: Folder or hub id of a causal language model in transformers' layout.
            layers: Zero-indexed decoder layers whose residuals are wanted.

        Raises:
            ConfigError: transformers is not installed, the model can not be loaded, or it has no
                such layer.
        """
        whole, self.tokenizer = load_whole(model)
        self._decoder = whole.get_decoder()
        self._layers = decoder_layers(whole, model)
        self._wanted = sorted(set(layers))
        if self._wanted[-1] >= len(self._layers):
            raise ConfigError(
                f"model {model} has {len(self._layers)} layers but layer {self._wanted[-1]} is"
                " observed; give with --model the one that they were trained on."
            )
        self.num_layers = len(self._layers)
        # The layers above change nothing below them, and need not run.
        del self._layers[self._wanted[-1] + 1 :]

    @property
    def d_model(self) -> int:
        return self._decoder.config.hidden_size

    @property
    def max_tokens(self) -> int:
        """The longest sequence that the model was made for."""
        return self._decoder.config.max_position_embeddings

    @torch.inference_mode()
    def residuals(self, token_ids: Sequence[int]) -> dict[int, Tensor]:
        """resid_post by layer, float32 [len(token_ids), d_model], of a sequence from position 0.

        Read as the layer returns it: transformers' `hidden_states` have the final norm applied to
        the last one.
        """
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                hidden = output if isinstance(output, Tensor) else output[0]
                found[layer] = hidden[0].float()

            return hook

        handles = [self._layers[at].register_forward_hook(keep(at)) for at in self._wanted]
        try:
            self._decoder(input_ids=torch.tensor([list(token_ids)]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found
