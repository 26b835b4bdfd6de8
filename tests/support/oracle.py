"""What a token's features are, by code that nobody here wrote: HF transformers and SAELens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sae_lens
import torch
from transformers import AutoModelForCausalLM


@dataclass
class Comparison:
    """Rows compared, the sinks among them, those that differ, and the largest relative error."""

    rows: int = 0
    sinks: int = 0
    wrong: list[str] = field(default_factory=list)
    worst_relative_error: float = 0.0


class Oracle:
    """Features of SAEs after layers of the model in `folder`, in float32."""

    def __init__(
        self,
        folder: Path,
        saes: dict[int, Path],
        sink_norms: dict[int, float],
        tolerance: float = 1e-3,
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.saes = {layer: sae_lens.SAE.load_from_disk(path) for layer, path in saes.items()}
        self.sink_norms = sink_norms
        self.tolerance = tolerance
        # Tiny models on a machine that others keep busy: threads would wait for each other.
        torch.set_num_threads(1)

    @torch.no_grad()
    def residuals(self, token_ids: Sequence[int]) -> dict[int, torch.Tensor]:
        """float32 [len(token_ids), d_model] by layer."""
        hidden = self.model(torch.tensor([list(token_ids)]), output_hidden_states=True)
        return {layer: hidden.hidden_states[layer + 1][0] for layer in self.saes}

    @torch.no_grad()
    def compare(
        self, context: Sequence[int], events: Sequence[dict[str, Any]], into: Comparison
    ) -> None:
        """Check the `prompt` and `token` events that have features; ranked by activation."""
        for layer, residual in self.residuals(context).items():
            norms = residual.norm(dim=1).tolist()
            expected = self.saes[layer].encode(residual)
            for event in events:
                if event["layer"] == layer:
                    at = event["position"]
                    faults = self._faults(event, expected[at], norms[at], into)
                    if faults:
                        where = f"{event['internal_id']} layer {layer} position {at}"
                        into.wrong.append(f"{where}: {', '.join(faults)}")

    def _faults(
        self, event: dict[str, Any], row: torch.Tensor, norm: float, into: Comparison
    ) -> list[str]:
        into.rows += 1
        sink, cut = event.get("sink", False), self.sink_norms[event["layer"]]
        # The calibration's own cut is that of its histogram: to 1 %.
        if sink != (norm > cut) and abs(norm / cut - 1) > 0.02:
            return ["sink"]
        # Some of the features may lie within rounding of their thresholds.
        faults = [] if abs(event["l0"] - int((row > 0).sum())) <= 2 else ["l0"]
        if sink:
            into.sinks += 1
            return faults + ["features of a sink"] * bool(event["top_features"])
        last = float(row.topk(max(len(event["top_features"]), 1)).values[-1])
        slack = self.tolerance * max(last, 1.0)
        for feature in event["top_features"]:
            want = float(row[feature["index"]])
            error = abs(feature["activation"] - want) / max(abs(want), 1.0)
            into.worst_relative_error = max(into.worst_relative_error, error)
            # Features closer to each other than the tolerance may trade the last place.
            if error > self.tolerance or want < last - slack:
                faults.append(str(feature["index"]))
        indices = {feature["index"] for feature in event["top_features"]}
        missed = (row > last + slack).nonzero().flatten().tolist()
        return faults + [str(index) for index in missed if index not in indices]
