"""A loop over transformers and SAELens, as a researcher would write it: what a corpus pass is
measured against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.engine.hf.loading import decoder_layers, load_whole
from neuroscope_vllm.engine.protocol import Chunk

BATCH = 8
"""Sequences at a time."""


class PlainLoop:
    """The model cut off above `layer`, and the SAE as SAELens runs it."""

    def __init__(self, model: str, sae_folder: str, layer: int, dtype: str) -> None:
        """
        Args:
            dtype: Of the model, "float32" or "bfloat16"; the SAE is float32.

        Raises:
            ConfigError: SAELens is not installed, or something can not be loaded.
        """
        try:
            import sae_lens
        except ImportError:
            raise ConfigError(
                "the loop that is compared with needs SAELens; pip install sae-lens."
            ) from None
        whole, _ = load_whole(model)
        whole.set_attn_implementation("sdpa")  # load_whole's is slower
        del decoder_layers(whole, model)[layer + 1 :]
        self._decoder = whole.get_decoder().to(getattr(torch, dtype))
        self._decoder.norm = nn.Identity()  # its output is then the layer's
        self._sae = sae_lens.SAE.load_from_disk(sae_folder)

    @torch.inference_mode()
    def run(self, sequences: Chunk) -> int:
        """Encode every token; returns how many features fired."""
        fired = 0
        by_length = sorted(sequences, key=len)
        for at in range(0, len(by_length), BATCH):
            batch = by_length[at : at + BATCH]
            longest = len(batch[-1])
            ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in batch])
            mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in batch])
            hidden: Tensor = self._decoder(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
            fired += int((self._sae.encode(hidden[mask.bool()].float()) > 0).sum())
        return fired
