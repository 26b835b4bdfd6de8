"""transformers as an `Engine`: the layers up to the last observed one, on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from neuroscope_vllm.core.artefacts import model_files
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import EngineError
from neuroscope_vllm.core.passes import Gatherer, Pass, Rows
from neuroscope_vllm.core.sae import check_fits, load_sae
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.observed import named, observed
from neuroscope_vllm.engine.hf.batches import batches, padded
from neuroscope_vllm.engine.hf.device import is_out_of_memory
from neuroscope_vllm.engine.hf.hooks import at_layer
from neuroscope_vllm.engine.hf.loading import decoder_layers, load_whole, placed
from neuroscope_vllm.engine.protocol import Chunk


class HFEngine:
    """See `engine.protocol.Engine`."""

    def __init__(
        self, model: str, settings: Settings, device: str = "auto", dtype: str = "auto"
    ) -> None:
        """
        Args:
            model: Folder or hub id.
            settings: SAEs, layers and `sae_input`; all else is for servers.
            device, dtype: As `device.place` takes them.

        Raises:
            ConfigError, SAEError, DownloadError: Something does not fit; one sentence says what.
            EngineError: The device has no room for the model.
        """
        settings = named(settings, model)
        self.model = model
        self.sae_input = settings.sae_input
        self.sites: dict[int, SAEInfo] = observed(settings)
        placement = placed(model, device, dtype)
        whole, self.tokenizer = load_whole(model, placement)

        import transformers  # load_whole says so where it is not installed

        self.identity = (
            f"transformers {transformers.__version__}, {placement}, {model_files(model)}"
        )
        layers = decoder_layers(whole, model)
        for layer, info in self.sites.items():
            check_fits(
                info,
                d_model=whole.config.get_text_config().hidden_size,
                num_layers=len(layers),
                layer=layer,
            )
        # The layers above change nothing below them, and need not run.
        del layers[max(self.sites) + 1 :]
        self._layers = layers
        self._decoder = whole.get_decoder()
        self._device = placement.device
        saes = [load_sae(source).to(placement.device) for source in settings.sae]
        if settings.sae_input == "rms":
            saes = [sae.reading_rms() for sae in saes]
        self._saes = dict(zip(self.sites, saes, strict=True))
        self.max_tokens: int = self._decoder.config.max_position_embeddings

    @torch.inference_mode()
    def run(self, what: Pass, sequences: Chunk) -> dict[int, bytes]:
        gatherers = {layer: what.gather(layer, sae) for layer, sae in self._saes.items()}
        try:
            for start, batch in batches(sequences):
                self._run(gatherers, start, batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise EngineError(
                f"the {self._device.type} device ran out of memory on a sequence of"
                f" {max(map(len, sequences))} tokens; give a smaller --max-tokens, a shorter"
                " --dtype, or --device cpu. What was done stands, and the command goes on there."
            ) from error
        return {layer: gatherer.result() for layer, gatherer in gatherers.items()}

    def run_each(
        self, what: Callable[[], Pass], chunks: Iterable[Chunk]
    ) -> Iterator[dict[int, bytes]]:
        return (self.run(what(), chunk) for chunk in chunks)

    def close(self) -> None:
        del self._decoder, self._layers, self._saes

    def _run(self, gatherers: dict[int, Gatherer], start: int, batch: Chunk) -> None:
        ids, there = padded(batch)
        which, position = there.nonzero(as_tuple=True)
        with ExitStack() as stack:
            for layer, gatherer in gatherers.items():
                gather = functools.partial(
                    self._gather, gatherer, there, which + start, position, ids[there]
                )
                stack.enter_context(at_layer(self._layers[layer], gather))
            self._decoder(input_ids=ids.to(self._device), use_cache=False)

    def _gather(
        self,
        gatherer: Gatherer,
        there: Tensor,
        sequence: Tensor,
        position: Tensor,
        token_id: Tensor,
        hidden: Tensor,
    ) -> None:
        rows = hidden[there.to(hidden.device)]
        gatherer.add(Rows(sequence, position, token_id, rows))
