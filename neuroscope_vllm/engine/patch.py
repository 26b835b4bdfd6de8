"""A sweep of activation patching on any `PatchEngine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from neuroscope_vllm.core.patching.metric import Ends
from neuroscope_vllm.core.patching.plan import Plan
from neuroscope_vllm.core.patching.swap import Swap
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.engine.protocol import Chunk, PatchEngine

AT_ONCE = 64
"""Runs that an engine is asked for together."""


def differences(engine: PatchEngine, sequences: Chunk, tokens: tuple[int, int]) -> list[float]:
    """Logit of the first token less that of the second, after each sequence as it is."""
    found = engine.patched(sequences, [()] * len(sequences), tokens)
    return (found[:, 0] - found[:, 1]).tolist()


def ends_of(
    engine: PatchEngine, clean: Sequence[int], corrupted: Sequence[int], tokens: tuple[int, int]
) -> Ends:
    return Ends(*differences(engine, [clean, corrupted], tokens))


def sweep(
    engine: PatchEngine,
    into: Sequence[int],
    source: Sequence[int],
    plan: Plan,
    tokens: tuple[int, int],
    saes: Mapping[int, SAE],
    on_progress: Callable[[int], None],
) -> list[float]:
    """The metric of each of the plan's runs, in their order.

    Args:
        into: Token ids of the prompt whose run is patched.
        source: Of the one that the activations are of.
        tokens: The answer and the wrong one.
        saes: By layer, whose features are patched; without any, whole residuals are.
        on_progress: Called with how many runs are done.

    Raises:
        EngineError: The engine failed.
    """
    layers = sorted({run.target.layer for run in plan.runs})
    here, there = engine.residuals([into, source], layers)
    swaps = {layer: Swap(layer, here[layer], there[layer], saes.get(layer)) for layer in layers}
    metrics: list[float] = []
    for at in range(0, len(plan.runs), AT_ONCE):
        runs = plan.runs[at : at + AT_ONCE]
        edits = [
            [
                swaps[run.target.layer].replacement(
                    column.position, column.source, run.target.features
                )
                for column in run.columns
                if column.source is not None
            ]
            for run in runs
        ]
        found = engine.patched([into] * len(runs), edits, tokens)
        metrics += (found[:, 0] - found[:, 1]).tolist()
        on_progress(len(metrics))
    return metrics
