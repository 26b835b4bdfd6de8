"""What this engine can be steered with, for the processes that settle what is asked."""

from __future__ import annotations

from vllm.config import VllmConfig

from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.steering.catalogue import Catalogue, Operator, Site
from neuroscope_vllm.engine.serving.sites import steering_catalogue
from neuroscope_vllm.engine.vllm.settings import worker_settings

_BY_BLOCK_HASH = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""KV connectors that ask for blocks by vLLM's own hashes, which `prefix_salt` salts."""


def build(sites: dict[int, Site], operator: Operator, vllm_config: VllmConfig) -> Catalogue:
    """Raises ConfigError if the operator's file can not be used with this model."""
    return steering_catalogue(
        sites,
        operator,
        d_model=vllm_config.model_config.get_hidden_size(),
        staged=vllm_config.parallel_config.pipeline_parallel_size > 1,
        drafts=vllm_config.speculative_config is not None,
        kv_store=None if (name := connector(vllm_config)) in _BY_BLOCK_HASH else name,
    )


def connector(vllm_config: VllmConfig) -> str | None:
    """vLLM's KV connector, by name."""
    transfer = vllm_config.kv_transfer_config
    return None if transfer is None else transfer.kv_connector


def build_again(vllm_config: VllmConfig) -> Catalogue:
    """In an engine core: what the front process built."""
    settings = worker_settings(vllm_config)
    assert settings is not None
    sites = {
        site.layer: Site.of(
            load_sae(site.source),
            site.load_calibration(),
            settings.settings.sae_input,
        )
        for site in settings.sites
    }
    return build(sites, settings.operator, vllm_config)
