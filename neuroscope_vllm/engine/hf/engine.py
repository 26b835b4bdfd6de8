"""transformers as an `Engine`: one sequence at a time, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import transformers

from neuroscope_vllm.core.artefacts import model_files
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.passes import Pass, Rows
from neuroscope_vllm.core.sae import check_fits, load_sae
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.observed import named, observed
from neuroscope_vllm.engine.hf.oracle import Oracle
from neuroscope_vllm.engine.protocol import Chunk


class HFEngine:
    """See `engine.protocol.Engine`."""

    def __init__(self, model: str, settings: Settings) -> None:
        """
        Args:
            model: Folder or hub id.
            settings: SAEs, layers and `sae_input`; all else is for servers.

        Raises:
            ConfigError, SAEError, DownloadError: Something does not fit; one sentence says what.
        """
        settings = named(settings, model)
        self.model = model
        self.identity = f"transformers {transformers.__version__}, float32, {model_files(model)}"
        self.sae_input = settings.sae_input
        self.sites: dict[int, SAEInfo] = observed(settings)
        self._oracle = Oracle(model, list(self.sites))
        for layer, info in self.sites.items():
            check_fits(
                info, d_model=self._oracle.d_model, num_layers=self._oracle.num_layers, layer=layer
            )
        self._saes = dict(zip(self.sites, map(load_sae, settings.sae), strict=True))
        if settings.sae_input == "rms":
            self._saes = {layer: sae.reading_rms() for layer, sae in self._saes.items()}
        self.max_tokens = self._oracle.max_tokens
        self.tokenizer: Any = self._oracle.tokenizer

    def run(self, what: Pass, sequences: Chunk) -> dict[int, bytes]:
        gatherers = {layer: what.gather(layer, sae) for layer, sae in self._saes.items()}
        for number, sequence in enumerate(sequences):
            token_id = torch.tensor(list(sequence))
            position = torch.arange(len(sequence))
            for layer, residual in self._oracle.residuals(sequence).items():
                which = torch.full_like(position, number)
                gatherers[layer].add(Rows(which, position, token_id, residual))
        return {layer: gatherer.result() for layer, gatherer in gatherers.items()}

    def run_each(
        self, what: Callable[[], Pass], chunks: Iterable[Chunk]
    ) -> Iterator[dict[int, bytes]]:
        return (self.run(what(), chunk) for chunk in chunks)

    def close(self) -> None:
        del self._oracle, self._saes
