"""Every model family that is observed: all features of every position, from chunks of several
sequences at once, are those of transformers and SAELens, in float32.

Tiny random models with the peculiarities of the published ones, in proportion: what makes a family
differ is small enough to matter within a hundred tokens, and a test each shows that it does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from neuroscope_vllm.core.passes import TokenFeatures
from tests.support import models
from tests.support.feature_pass import Job, run_jobs

FLAGS = (
    *("--dtype", "float32", "--enforce-eager"),
    # Chunked prefill: several sequences in a step, and the longer ones in pieces.
    *("--max-num-batched-tokens", "64", "--max-num-seqs", "4"),
)
TEXT_ONLY = ("--limit-mm-per-prompt", '{"image": 0}')
LENGTHS = (5, 130, 33, 70, 1, 90)
WIDTH = 256
FULL = {"rope_type": "default", "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


@dataclass(frozen=True)
class Family:
    """A model that stands for published ones.

    Attributes:
        kind: What `write_tiny_model` calls it.
        layers, d_model: Its size.
        observed: Layers with an SAE; those above the last are not built.
        published: Settings in the words of the published config.json; `...` removes one.
        peculiar: By name, what the text model's config would be without it.
    """

    kind: str
    layers: int
    d_model: int
    observed: tuple[int, ...]
    published: dict[str, Any]
    peculiar: dict[str, dict[str, Any]]
    shape: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


# A local layer forgets what is further back than the window; every sixth is global.
GEMMA_3 = {
    "sliding_window": 16,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "layer_types": ...,
    "rope_parameters": ...,
}
FAMILIES = {
    # Heads of another size than d_model / heads; 42 layers, every other one local.
    "gemma-2-9b": Family(
        kind="gemma2",
        layers=42,
        d_model=56,
        observed=(0, 1, 9),
        published={"sliding_window": 16, "attn_logit_softcapping": 1.0, "layer_types": ...},
        peculiar={
            "window": {"sliding_window": 2048},
            "soft-capping": {"attn_logit_softcapping": None},
        },
    ),
    # Queries scaled by d_model / heads, which is not the size of a head; 46 layers.
    "gemma-2-27b": Family(
        kind="gemma2",
        layers=46,
        d_model=144,
        observed=(3, 10),
        published={"sliding_window": 16, "query_pre_attn_scalar": 72, "layer_types": ...},
        peculiar={
            "window": {"sliding_window": 2048},
            "query scale": {"query_pre_attn_scalar": 32},
        },
    ),
    "gemma-3-1b": Family(
        kind="gemma3",
        layers=26,
        d_model=48,
        observed=(0, 5, 7),
        published=GEMMA_3,
        peculiar={
            "window": {"sliding_window": 2048},
            "global layers": {"layer_types": ["sliding_attention"] * 26},
            "local base": {"rope_parameters": {"full_attention": FULL, "sliding_attention": FULL}},
        },
    ),
    # The text model lies inside another, and its global layers stretch positions.
    "gemma-3-4b": Family(
        kind="gemma3-multimodal",
        layers=14,
        d_model=48,
        observed=(5, 9),
        published=GEMMA_3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        peculiar={
            "window": {"sliding_window": 2048},
            "stretch": {"rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL}},
        },
        flags=TEXT_ONLY,
    ),
    # Four heads share one key; long wavelengths are stretched.
    "llama-3.1-8b": Family(
        kind="llama",
        layers=16,
        d_model=128,
        observed=(3, 8),
        published={
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
            "rope_parameters": ...,
        },
        peculiar={"stretch": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}},
        shape={"num_attention_heads": 4, "tie_word_embeddings": False},
    ),
    "smollm2": Family(
        kind="llama",
        layers=30,
        d_model=96,
        observed=(5, 12),
        published={"rope_theta": 100000.0, "rope_scaling": None, "rope_parameters": ...},
        peculiar={"base": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}},
        shape={"num_attention_heads": 3, "tie_word_embeddings": True},
    ),
}
PECULIAR = [(name, what) for name, family in FAMILIES.items() for what in family.peculiar]


@dataclass(frozen=True)
class Ran:
    """One family's model, SAEs by layer, sequences, and what vLLM made of them."""

    family: Family
    job: Job
    saes: dict[int, Any]

    def wrong_rows(self, peculiarity: str | None = None) -> float:
        """Share of rows, over all layers, with a feature that transformers and SAELens have
        otherwise, or have not; with one peculiarity left out of what transformers runs."""
        config = AutoConfig.from_pretrained(self.job.model)
        for name, value in self.family.peculiar.get(peculiarity or "", {}).items():
            setattr(config.get_text_config(), name, value)
        hf = AutoModelForCausalLM.from_pretrained(
            self.job.model, config=config, dtype=torch.float32, attn_implementation="eager"
        )
        wrong, results = [], self.job.results()
        with torch.no_grad():
            states = [
                hf(torch.tensor([sequence]), output_hidden_states=True).hidden_states
                for sequence in self.job.sequences
            ]
            for layer, sae in self.saes.items():
                expected = sae.encode(torch.cat([state[layer + 1][0] for state in states]))
                wrong.append(_differ(_dense(results[layer]), expected, sae.threshold))
        return float(torch.cat(wrong).float().mean())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """All families, one after the other in one process: most of the time goes to starting vLLM."""
    torch.set_num_threads(1)  # where others keep a core busy, threads wait for each other
    folder = tmp_path_factory.mktemp("families")
    jobs = {name: _job(folder / name, family) for name, family in FAMILIES.items()}
    run_jobs(list(jobs.values()), folder)
    return {
        name: Ran(
            FAMILIES[name],
            job,
            {
                layer: sae_lens.SAE.load_from_disk(sae)
                for layer, sae in zip(FAMILIES[name].observed, job.saes, strict=True)
            },
        )
        for name, job in jobs.items()
    }


def _job(folder: Path, family: Family) -> Job:
    shape = {"d_model": family.d_model, "layers": family.layers, **family.shape}
    model = models.write_tiny_model(folder / "model", family.kind, **shape)
    _publish(model / "config.json", family.published)
    saes = [
        models.write_saelens_sae(
            folder / f"layer_{layer}", d_model=family.d_model, width=WIDTH, layer=layer, seed=layer
        )
        for layer in family.observed
    ]
    draw = torch.Generator().manual_seed(0)
    sequences = [[2, *torch.randint(5, 400, (n,), generator=draw).tolist()] for n in LENGTHS]
    return Job(folder / "out", model, saes, sequences, [*FLAGS, *family.flags])


def _publish(path: Path, settings: dict[str, Any]) -> None:
    """In the words of those who published the family, which are older than transformers 5's."""
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    text |= settings
    for name in [name for name, value in text.items() if value is ...]:
        del text[name]
    path.write_text(json.dumps(config))


def _dense(found: TokenFeatures) -> Tensor:
    """[n, WIDTH]."""
    rows = torch.arange(len(found.position)).repeat_interleave(found.start.diff())
    dense = torch.zeros(len(found.position), WIDTH)
    dense[rows, found.feature] = found.activation
    return dense


def _differ(ours: Tensor, theirs: Tensor, threshold: Tensor) -> Tensor:
    """bool [n]: rows with a feature that differs by more than 1e-3.

    One within rounding of its threshold may be on for one and off for the other.
    """
    slack = 1e-3 * theirs.clamp(min=1.0)
    at_threshold = ((ours > 0) != (theirs > 0)) & ((ours + theirs - threshold).abs() < slack)
    return (((ours - theirs).abs() > slack) & ~at_threshold).any(dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_position_is_there_once(ran: dict[str, Ran], name: str) -> None:
    job, family = ran[name].job, FAMILIES[name]
    results = job.results()
    assert sorted(results) == list(family.observed)
    for found in results.values():
        places = list(zip(found.sequence.tolist(), found.position.tolist(), strict=True))
        assert places == [(i, at) for i, ids in enumerate(job.sequences) for at in range(len(ids))]
        assert found.token_id.tolist() == [token for ids in job.sequences for token in ids]
        assert float((found.start.diff() >= 5).float().mean()) > 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_transformers_and_saelens(ran: dict[str, Ran], name: str) -> None:
    assert ran[name].wrong_rows() == 0


@pytest.mark.parametrize(("name", "what"), PECULIAR)
def test_a_model_without_its_peculiarity_has_other_features(
    ran: dict[str, Ran], name: str, what: str
) -> None:
    """Else the test above would not see it if vLLM ignored it."""
    assert ran[name].wrong_rows(peculiarity=what) > 0.1
