"""An `Engine` without a model: a token's residual is a function of its id and position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.passes import Pass, Rows
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.sae.observed import observed
from neuroscope_vllm.engine.protocol import Chunk


def residual_of(sequence: list[int], d_model: int) -> Tensor:
    """float32 [n, d_model]."""
    token = torch.tensor(sequence, dtype=torch.float32)[:, None] + 1
    position = torch.arange(len(sequence))[:, None]
    return 5 * torch.sin(token * (torch.arange(d_model) + 1) * 0.37 + position)


class FakePasses:
    """See `engine.protocol.Engine`."""

    def __init__(self, model: Path, settings: Settings) -> None:
        self.model, self.identity = str(model), "fake"
        self.sites, self.sae_input, self.max_tokens = observed(settings), "raw", 1024
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._saes = dict(zip(self.sites, map(load_sae, settings.sae), strict=True))

    def run(self, what: Pass, sequences: Chunk) -> dict[int, bytes]:
        found = {}
        for layer, sae in self._saes.items():
            gatherer = what.gather(layer, sae)
            for number, sequence in enumerate(sequences):
                position = torch.arange(len(sequence))
                token_id = torch.tensor(list(sequence))
                rows = residual_of(list(sequence), sae.d_model)
                which = torch.full_like(position, number)
                gatherer.add(Rows(which, position, token_id, rows))
            found[layer] = gatherer.result()
        return found

    def run_each(
        self, what: Callable[[], Pass], chunks: Iterable[Chunk]
    ) -> Iterator[dict[int, bytes]]:
        return (self.run(what(), chunk) for chunk in chunks)

    def close(self) -> None:
        pass
