"""Sparse autoencoders: `load_sae` reads one, `SAE` holds it, `encoder` runs it on the hot path.

The names below are imported on first use, so `core.sae.info` can be imported without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroscope_vllm.core.sae.canonical import canonical_source
    from neuroscope_vllm.core.sae.info import SAEInfo, check_fits
    from neuroscope_vllm.core.sae.load import load_sae, read_sae_info
    from neuroscope_vllm.core.sae.sae import SAE

__all__ = ["SAE", "SAEInfo", "canonical_source", "check_fits", "load_sae", "read_sae_info"]

_HOME = {
    "SAE": "sae",
    "SAEInfo": "info",
    "canonical_source": "canonical",
    "check_fits": "info",
    "load_sae": "load",
    "read_sae_info": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
