"""What a change of one residual does to the next token, computed with transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.engine.hf.hooks import at_layer
from neuroscope_vllm.engine.hf.loading import decoder_layers, load_whole


class Ablator:
    """A whole model, float32 on the CPU, whose residual at one layer can be read and edited.

    Attributes:
        num_layers, d_model: The model's.
        tokenizer: The model's.
    """

    def __init__(self, model: str, layer: int) -> None:
        """
        Args:
            model: Folder or hub id of a causal language model in transformers' layout.
            layer: Zero-indexed decoder layer.

        Raises:
            ConfigError: transformers is not installed, the model can not be loaded, or it has no
                such layer.
        """
        self._model, self.tokenizer = load_whole(model)
        layers = decoder_layers(self._model, model)
        self.num_layers = len(layers)
        self.d_model: int = self._model.config.get_text_config().hidden_size
        if layer >= self.num_layers:
            raise ConfigError(
                f"model {model} has {self.num_layers} layers but layer {layer} is observed; give"
                " the layer that the SAE reads."
            )
        self._layer = layers[layer]

    @torch.inference_mode()
    def residual(self, token_ids: Sequence[int]) -> Tensor:
        """resid_post of the layer, float32 [len(token_ids), d_model], from position 0."""
        found: list[Tensor] = []
        with at_layer(self._layer, lambda hidden: found.append(hidden[0].float())):
            self._model.get_decoder()(input_ids=torch.tensor([list(token_ids)]), use_cache=False)
        return found[0]

    @torch.inference_mode()
    def next_logits(self, token_ids: Sequence[int], edits: Tensor) -> Tensor:
        """Logits after the last of `token_ids`, float32 [v, vocabulary].

        Args:
            token_ids: At least two, from position 0.
            edits: float32 [v, d_model], each added to the last token's residual in a run of its
                own. What comes before is the same in all and computed once.
        """
        *before, last = token_ids
        decoder = self._model.get_decoder()
        cache = decoder(input_ids=torch.tensor([before]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(edits))
        with at_layer(self._layer, lambda hidden: hidden + edits[:, None]):
            out = self._model(
                input_ids=torch.full((len(edits), 1), last), past_key_values=cache, use_cache=True
            )
        return out.logits[:, -1].float()
