"""The offline half of `neuroscope verify`: everything once more, and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroscope_vllm.cli.storm import Outcome
from neuroscope_vllm.core.audit import Audit, Verdict, audit
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.fit import TOLERANCE, Judge, published
from neuroscope_vllm.core.ranking import make_ranker
from neuroscope_vllm.core.sae import check_fits, load_sae
from neuroscope_vllm.engine.hf.oracle import Oracle


class Recomputation:
    """The model, SAEs and rankings of a server, loaded here.

    Attributes:
        layers: Observed layers.
        tolerance: Of an activation's relative error.
        cached: Prompt positions found without features, as the prefix cache allows.
    """

    def __init__(
        self, sites: list[dict[str, Any]], model: str, saes: Sequence[str], tolerance: float | None
    ) -> None:
        """`sites` as `/v1/features/describe` gives them; `saes`: other places to find their SAEs.

        Raises ConfigError, SAEError or DownloadError where something is not to be had here.
        """
        if saes and len(saes) != len(sites):
            layers = ", ".join(str(site["layer"]) for site in sites)
            raise ConfigError(
                f"{len(saes)} SAEs for the observed layers {layers}; give one --sae per layer, in"
                " this order."
            )
        precisions = [TOLERANCE.get(site["dtype"], TOLERANCE["bfloat16"]) for site in sites]
        self.tolerance = max(precisions) if tolerance is None else tolerance
        self.layers = [site["layer"] for site in sites]
        self.cached = 0
        self._oracle = Oracle(model, self.layers)
        self._judges = {
            site["layer"]: self._judge(site, saes[i] if saes else None)
            for i, site in enumerate(sites)
        }

    def _judge(self, site: dict[str, Any], elsewhere: str | None) -> Judge:
        """Of one observed layer. An SAE that lies elsewhere here has its calibration beside it."""
        recorded = site["sae"]
        calibration_file = site["calibration"]
        if elsewhere is None:
            source = recorded["source"]
            sae = load_sae(source, revision=None if "@" in source else recorded["revision"])
        else:
            sae = load_sae(elsewhere)
            if calibration_file is not None:
                calibration_file = Path(elsewhere).expanduser() / Path(calibration_file).name
        calibration = None if calibration_file is None else Calibration.load(calibration_file)
        oracle = self._oracle
        check_fits(
            sae.info, d_model=oracle.d_model, num_layers=oracle.num_layers, layer=site["layer"]
        )
        if site["sae_input"] == "rms":
            sae = sae.reading_rms()
        ranker = make_ranker(site["ranking"], calibration, site["max_frequency"], width=sae.width)
        return Judge(
            sae,
            ranker,
            top_k=site["top_k"],
            sink_norm=None if calibration is None else calibration.sink_norm,
            tolerance=self.tolerance,
        )

    def verdict(self, outcomes: list[Outcome], advance: Callable[[], object]) -> Verdict:
        """Compare all that was published. `advance` is called once a request."""
        verdict = Verdict(requests=len(outcomes))
        audits = [audit(outcome.answer, outcome.events, self.layers) for outcome in outcomes]
        residuals: dict[tuple[int, ...], dict[int, Tensor]] = {}
        for one in audits:
            for context in one.contexts.values():
                if tuple(context) not in residuals:
                    residuals[tuple(context)] = self._oracle.residuals(context)
            verdict.tokens += sum(map(len, one.contexts.values()))
            verdict.missing += one.missing
            verdict.duplicated += one.duplicated
            verdict.misattributed += one.misattributed
            self.cached += one.cached
            advance()
        for layer in self.layers:
            self._compare(layer, audits, residuals, verdict)
        return verdict

    def _compare(
        self,
        layer: int,
        audits: list[Audit],
        residuals: dict[tuple[int, ...], dict[int, Tensor]],
        verdict: Verdict,
    ) -> None:
        judge = self._judges[layer]
        found = [
            (row.event, residuals[tuple(one.contexts[row.choice])][layer][row.position])
            for one in audits
            for row in one.rows
            if row.layer == layer
        ]
        if not found:
            return
        rows = published([event for event, _ in found], judge.top_k)
        fit = judge.fit(rows, torch.stack([residual for _, residual in found]))
        verdict.worst_relative_error = max(verdict.worst_relative_error, float(fit.error.max()))
        if bool(fit.right.all()):
            return
        everything = torch.cat([by_layer[layer] for by_layer in residuals.values()])
        elsewhere = judge.fits_another(rows.part(~fit.right), everything)
        verdict.misattributed += int(elsewhere.sum())
        verdict.wrong_features += int((~elsewhere).sum())
