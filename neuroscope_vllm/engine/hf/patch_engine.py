"""transformers as a `PatchEngine`: many sequences at once, on any device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuroscope_vllm.core.artefacts import model_files
from neuroscope_vllm.core.patching.align import common_start
from neuroscope_vllm.core.patching.swap import Replacement
from neuroscope_vllm.engine.hf.batches import fitting, padded
from neuroscope_vllm.engine.hf.hooks import Replace, at_layer
from neuroscope_vllm.engine.hf.loading import decoder_layers, load_whole, placed
from neuroscope_vllm.engine.protocol import Chunk


class HFPatchEngine:
    """See `engine.protocol.PatchEngine`."""

    def __init__(self, model: str, device: str = "auto", dtype: str = "auto") -> None:
        """
        Args:
            model: Folder or hub id.
            device, dtype: As `device.place` takes them.

        Raises:
            ConfigError: transformers is not installed, or the model can not be loaded.
            EngineError: The device has no room for it.
        """
        placement = placed(model, device, dtype)
        self._device = placement.device
        self._model, self.tokenizer = load_whole(model, placement)

        import transformers  # load_whole says so where it is not installed

        self._layers = decoder_layers(self._model, model)
        config = self._model.get_decoder().config
        self.model = model
        self.identity = (
            f"transformers {transformers.__version__}, {placement}, {model_files(model)}"
        )
        self.num_layers = len(self._layers)
        self.d_model: int = config.hidden_size
        self.max_tokens: int = config.max_position_embeddings

    @torch.inference_mode()
    def residuals(self, sequences: Chunk, layers: Sequence[int]) -> list[dict[int, Tensor]]:
        found: list[dict[int, Tensor]] = []
        last = max(layers, default=-1)
        for sequence in sequences:
            rows: dict[int, Tensor] = {}
            keep: dict[int, Replace] = {
                layer: functools.partial(_keep, rows, layer, last) for layer in layers
            }
            with contextlib.suppress(_EnoughError), self._at(keep):
                self._decode(torch.tensor([list(sequence)]), None)
            found.append(rows)
        return found

    @torch.inference_mode()
    def patched(
        self, sequences: Chunk, edits: Sequence[Sequence[Replacement]], tokens: Sequence[int]
    ) -> Tensor:
        found = torch.empty(len(sequences), len(tokens))
        # The later the first edit, the more is the same as without, and computed once.
        first = [min((edit.position for edit in own), default=len(s)) for s, own in zip(
            sequences, edits, strict=True)]  # fmt: skip
        order = sorted(range(len(sequences)), key=lambda i: first[i])
        at = 0
        while at < len(order):
            batch = fitting(order[at:], sequences)
            at += len(batch)
            shared = _shared([sequences[i] for i in batch], min(first[i] for i in batch))
            logits = self._batch([sequences[i] for i in batch], [edits[i] for i in batch], shared)
            found[batch] = logits.float().log_softmax(dim=1)[:, list(tokens)].cpu()
        return found

    def close(self) -> None:
        del self._model, self._layers

    def _batch(
        self, sequences: Chunk, edits: Sequence[Sequence[Replacement]], shared: int
    ) -> Tensor:
        """Logits [sequences, vocabulary]; the first `shared` tokens of all are the same."""
        cache = None
        if shared:
            start = torch.tensor([list(sequences[0][:shared])])
            cache = self._decode(start, None, use_cache=True)
            cache.batch_repeat_interleave(len(sequences))
        rests = [list(sequence[shared:]) for sequence in sequences]
        ids, _ = padded(rests)
        with self._at(_replacing(edits, shared)):
            ends = torch.tensor([len(rest) - 1 for rest in rests])
            kept, which = ends.unique(return_inverse=True)
            out = self._model(
                input_ids=ids.to(self._device),
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=kept.to(self._device),
            )
        return out.logits[torch.arange(len(rests)), which]

    def _decode(self, ids: Tensor, cache: Any, use_cache: bool = False) -> Any:
        decoder, ids = self._model.get_decoder(), ids.to(self._device)
        return decoder(input_ids=ids, past_key_values=cache, use_cache=use_cache).past_key_values

    def _at(self, replace: dict[int, Replace]) -> contextlib.ExitStack:
        with contextlib.ExitStack() as stack:
            for layer, do in replace.items():
                stack.enter_context(at_layer(self._layers[layer], do))
            return stack.pop_all()


class _EnoughError(Exception):
    """What comes after this layer is not wanted."""


def _keep(rows: dict[int, Tensor], layer: int, last: int, hidden: Tensor) -> None:
    rows[layer] = hidden[0].float().cpu()
    if layer == last:
        raise _EnoughError


def _shared(sequences: Chunk, first_edit: int) -> int:
    """Tokens that all begin with and nothing is edited in; the last token of each always runs."""
    shortest = min(map(len, sequences))
    same = min(common_start(sequences[0], other) for other in sequences)
    return min(same, first_edit, shortest - 1)


def _replacing(edits: Sequence[Sequence[Replacement]], shared: int) -> dict[int, Replace]:
    """By layer, what puts the replacements of each sequence in the place of its hidden states."""
    places: dict[int, list[tuple[int, int, Tensor]]] = {}
    for number, own in enumerate(edits):
        for edit in own:
            place = (number, edit.position - shared, edit.residual)
            places.setdefault(edit.layer, []).append(place)

    def replace(which: list[int], where: list[int], residual: Tensor, hidden: Tensor) -> Tensor:
        new = hidden.clone()
        new[which, where] = residual.to(hidden)
        return new

    found: dict[int, Replace] = {}
    for layer, of_layer in places.items():
        which, where, residuals = map(list, zip(*of_layer, strict=True))
        found[layer] = functools.partial(replace, which, where, torch.stack(residuals))
    return found
