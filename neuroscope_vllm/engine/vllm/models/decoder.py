"""The decoder loop that vLLM's pre-norm models share, with the hook in it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.sequence import IntermediateTensors

from neuroscope_vllm.engine.vllm.compat import hooks_natively
from neuroscope_vllm.engine.vllm.hook import ActivationHook

DYNAMIC_DIMS: dict[str, Any] = {
    "input_ids": 0,
    "positions": 0,
    "intermediate_tensors": 0,
    "inputs_embeds": 0,
}


class ObservedDecoder(nn.Module):
    """Mixed in before a vLLM model whose layers return (hidden, residual).

    `forward` is vLLM's own with one line more. Auxiliary hidden states (EAGLE-3 drafters) are not
    collected here; `refusals` keeps such configurations out.
    """

    # What the vLLM model brings.
    embed_input_ids: Any
    layers: Any
    norm: Any
    start_layer: int
    end_layer: int

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.activation_hook = ActivationHook.for_model(
            vllm_config, self.start_layer, self.end_layer
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        hidden: Any
        residual: Any
        if get_pp_group().is_first_rank:
            hidden = inputs_embeds if inputs_embeds is not None else self.embed_input_ids(input_ids)
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        for layer, block in enumerate(
            islice(self.layers, self.start_layer, self.end_layer), start=self.start_layer
        ):
            hidden, residual = block(positions, hidden, residual)
            hidden, residual = self.activation_hook(layer, hidden, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        hidden, _ = self.norm(hidden, residual)
        return hidden


class ObservedForCausalLM(nn.Module):
    """Mixed in before a vLLM ...ForCausalLM: its decoder loop calls an ActivationHook.

    Where vLLM's own loop calls one, that one is given; else another inner model is built.
    """

    # What the vLLM model brings; the last where vLLM's own loop calls a hook.
    config: Any
    model: Any
    set_activation_hook: Any

    observed: ClassVar[tuple[ModuleType, str, type[ObservedDecoder]]]
    """vLLM's module, the name of the inner model in it, and what is built in its stead."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if not hooks_natively(type(self)):
            with building_with(*self.observed):
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            return
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        stage = self.model.start_layer, self.model.end_layer
        self.set_activation_hook(ActivationHook.for_model(vllm_config, *stage))

    # A model cut off for corpus passes leaves the weights of the layers above in the checkpoint,
    # which vLLM would call unknown.
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        layers = self.config.num_hidden_layers
        return super().load_weights(  # pyright: ignore[reportAttributeAccessIssue]
            (name, weight) for name, weight in weights if _layer_of(name) < layers
        )


def _layer_of(name: str) -> int:
    """The decoder layer that a weight belongs to; -1: none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


@contextlib.contextmanager
def building_with(module: ModuleType, name: str, replacement: type) -> Iterator[None]:
    """While vLLM's constructor runs, let its module build `replacement` as the inner model.

    vLLM's ...ForCausalLM constructors name their inner model class directly; this keeps the rest
    of the constructor vLLM's own instead of a copy that drifts between versions.
    """
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)
