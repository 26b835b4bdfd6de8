"""Tokens that features make likelier or less likely, straight through the unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neuroscope_vllm.core.causal.graph import Tokens
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.token_labels import promoted_tokens, readable
from neuroscope_vllm.core.unembedding import read_unembedding

SHOWN = 5


def written_tokens(model: Path) -> Tokens:
    """What `graph_of` asks about the tokens of the model in a folder.

    Raises:
        ConfigError: The folder can not be read, or, when asked, is of another size.
    """
    weight, gain, tokenizer = read_unembedding(model)
    weight = weight.float()

    def texts(rows: list[list[int]]) -> list[list[str]]:
        decoded = ([readable(tokenizer.decode([token])) for token in row] for row in rows)
        return [[text for text in row if text][:SHOWN] for row in decoded]

    def of(sae: SAE, features: Sequence[int]) -> tuple[list[list[str]], list[list[str]]]:
        if sae.d_model != weight.shape[1]:
            raise ConfigError(
                f"model {model} is {weight.shape[1]} wide and SAE {sae.info.source} reads"
                f" {sae.d_model}; give the model that it was trained on."
            )
        if not features:
            return [], []
        directions = sae.W_dec[list(features)].float() * gain
        both = (promoted_tokens(sign * directions, weight, 2 * SHOWN) for sign in (1, -1))
        promotes, suppresses = map(texts, both)
        return promotes, suppresses

    return of
