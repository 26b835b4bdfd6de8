"""The SAE file formats that are read: one row, one file of this folder, for each publisher."""

from __future__ import annotations

from neuroscope_vllm.core.sae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    saelens,
    sparsify,
)
from neuroscope_vllm.core.sae.formats.base import Format, Located, load_tensors

FORMATS: dict[str, Format] = {
    "gemma-scope": Format(("params.npz",), gemma_scope.read_info, gemma_scope.open_tensors),
    "gemma-scope-2": Format(
        ("params.safetensors",),
        gemma_scope_2.read_info,
        gemma_scope_2.open_tensors,
        optional=("config.json",),
    ),
    "saelens": Format(
        ("cfg.json", "sae_weights.safetensors"), saelens.read_info, saelens.open_tensors
    ),
    "sparsify": Format(("cfg.json", "sae.safetensors"), sparsify.read_info, sparsify.open_tensors),
    "llama-scope": Format(
        ("hyperparams.json", "checkpoints/final.safetensors"),
        llama_scope.read_info,
        llama_scope.open_tensors,
    ),
    "dictionary-learning": Format(
        ("ae.pt", "config.json"), dictionary_learning.read_info, dictionary_learning.open_tensors
    ),
}

__all__ = ["FORMATS", "Format", "Located", "load_tensors"]
