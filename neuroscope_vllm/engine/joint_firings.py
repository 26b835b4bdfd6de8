"""What two SAEs of an engine do on the same tokens of a corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from neuroscope_vllm.core.causal.firings import JointFirings, LayerFirings
from neuroscope_vllm.core.corpus import Corpus
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.passes import FeaturePass, TokenFeatures
from neuroscope_vllm.engine.collect import known_calibrations
from neuroscope_vllm.engine.corpus_run import Done, describe, run_corpus, today
from neuroscope_vllm.engine.protocol import Engine


def joint_firings(
    engine: Engine, corpus: Corpus, on_progress: Callable[[Done], object] = lambda done: None
) -> tuple[JointFirings, Done, int]:
    """All that fires in both layers of an engine that observes two, 8 bytes a firing.

    Special tokens and attention sinks of either layer are left out; SAEs were not trained on them.

    Returns:
        The firings, the earlier layer's first; the run; and how many tokens were left out.

    Raises:
        ConfigError: The corpus can not be read or gives no samples.
        EngineError: The engine failed.
    """
    done = Done(run=describe(engine, corpus), created=today())
    cuts = {layer: found.sink_norm for layer, (_, found) in known_calibrations(engine).items()}
    if len(cuts) == len(engine.sites):
        done.sink_norm = cuts
    special = torch.tensor(sorted(engine.tokenizer.all_special_ids))
    lower, upper = sorted(engine.sites)
    parts: dict[int, list[LayerFirings]] = {lower: [], upper: []}
    left_out = 0
    # Nothing is kept of a run that is stopped, so no checkpoint can be another's.
    for _, results in run_corpus(engine, corpus, done, FeaturePass, Path()):
        done.sink_norm |= cuts
        found = {layer: FeaturePass.read(result) for layer, result in results.items()}
        kept = ~torch.isin(found[lower].token_id, special)
        for layer, tokens in found.items():
            kept &= tokens.norm <= done.sink_norm[layer]
        left_out += int((~kept).sum())
        for layer, tokens in found.items():
            parts[layer].append(_of(tokens, kept))
        on_progress(done)
    if not done.sequences:
        raise ConfigError(
            f"corpus {corpus.source} gave no sample of at least {corpus.min_tokens} tokens; give"
            " one with running text."
        )
    firings = JointFirings(
        _joined(parts[lower]),
        _joined(parts[upper]),
        engine.sites[lower].width,
        engine.sites[upper].width,
    )
    return firings, done, left_out


def _of(tokens: TokenFeatures, kept: Tensor) -> LayerFirings:
    """Of those tokens that are kept; `start` holds their counts until all are joined."""
    count = tokens.start.diff()
    fired = kept.repeat_interleave(count)
    return LayerFirings(count[kept], tokens.feature[fired].int(), tokens.activation[fired])


def _joined(parts: list[LayerFirings]) -> LayerFirings:
    count, feature, activation = map(torch.cat, zip(*parts, strict=True))
    return LayerFirings(torch.nn.functional.pad(count.cumsum(0), (1, 0)), feature, activation)
