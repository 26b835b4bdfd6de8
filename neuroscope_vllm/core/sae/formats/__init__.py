"""The SAE file formats that are read: one row, one file of this folder, for each publisher."""

from __future__ import annotations

from neuroscope_vllm.core.sae.formats import gemma_scope, saelens
from neuroscope_vllm.core.sae.formats.base import Format, Located, load_tensors

FORMATS: dict[str, Format] = {
    "gemma-scope": Format(("params.npz",), gemma_scope.read_info, gemma_scope.open_tensors),
    "saelens": Format(
        ("cfg.json", "sae_weights.safetensors"), saelens.read_info, saelens.open_tensors
    ),
}

__all__ = ["FORMATS", "Format", "Located", "load_tensors"]
