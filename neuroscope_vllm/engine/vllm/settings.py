"""What the front process decides and every worker reads, inside VllmConfig.additional_config.

The dict form travels with vLLM's own config to every process, Ray workers included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.steering.catalogue import Operator
from neuroscope_vllm.engine.serving.sites import SiteSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "neuroscope"
GRAPH_VERSION = 2
"""Raise when what the hook adds to the compiled graph changes."""


class WorkerSettings(msgspec.Struct, frozen=True):
    """Resolved: paths found, layers known, defaults filled in."""

    sites: list[SiteSettings]
    endpoint: str | None
    """The hub's; None: nothing is streamed, rows are there for corpus passes."""
    model: str
    settings: Settings
    operator: Operator = Operator()
    """Of steering, as the front process read it."""
    patched: list[int] = []
    """Layers of an engine whose residuals are read and replaced; such a one has no sites."""

    @property
    def layers(self) -> list[int]:
        return self.patched or [site.layer for site in self.sites]

    @property
    def steered(self) -> bool:
        """Whether requests may steer: an engine for corpus passes has none that could."""
        return self.endpoint is not None

    def input_norm(self, layer: int) -> str | None:
        """How rows are normalised before the layer's SAE encodes them, as in `SAEInfo`."""
        (site,) = (site for site in self.sites if site.layer == layer)
        return site.input_norm(self.settings)

    def graph_salt(self) -> str:
        """What the compiled graph depends on; a cache made with another salt is not ours."""
        saes = ",".join(f"{s.layer}:{s.source}@{s.info.revision}" for s in self.sites)
        if self.patched:
            return f"neuroscope-{GRAPH_VERSION}:patches:{self.patched}"
        steers = "steers" if self.steered else "observes"
        return f"neuroscope-{GRAPH_VERSION}:{steers}:{saes}"

    def to_dict(self) -> dict[str, Any]:
        return msgspec.to_builtins(self)


def given_flags(vllm_config_or_args: Any) -> dict[str, Any]:
    """The user's `{"neuroscope": {...}}`, from EngineArgs before anything is resolved."""
    additional = vllm_config_or_args.additional_config
    return dict(additional.get(KEY) or {}) if isinstance(additional, dict) else {}


def worker_settings(vllm_config: VllmConfig) -> WorkerSettings | None:
    """The resolved settings that `front` stored, or None when neuroscope is not configured."""
    additional = vllm_config.additional_config
    resolved = additional.get(KEY) if isinstance(additional, dict) else None
    if not resolved or "sites" not in resolved:
        return None
    return msgspec.convert(resolved, WorkerSettings)


def engine_name(vllm_config: VllmConfig) -> str:
    """Tells this engine core apart from all that may send to the same hub."""
    return f"{vllm_config.instance_id}-{engine_rank(vllm_config)}"


def engine_rank(vllm_config: VllmConfig) -> int:
    """Data-parallel rank of this engine. Ranks of dense models run as if each were alone, with
    rank 0 of 1; only the index still tells them apart."""
    return vllm_config.parallel_config.data_parallel_index
