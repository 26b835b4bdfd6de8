"""The layers that are observed: found and checked in the front process, built in a worker."""

from __future__ import annotations

import msgspec
import torch

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.artefacts import pinned
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.ranking import make_ranker
from neuroscope_vllm.core.sae import check_fits, load_sae
from neuroscope_vllm.core.sae.encoder import TopKEncoder
from neuroscope_vllm.core.sae.info import RMS, SAEInfo
from neuroscope_vllm.core.sae.observed import calibration_of, check_calibration, observed
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.steering import catalogue
from neuroscope_vllm.core.steering.catalogue import Catalogue, Operator
from neuroscope_vllm.core.steering.settle import SteeringRefused, settle
from neuroscope_vllm.core.steering.spec import SteeringSpec
from neuroscope_vllm.engine.serving.pipeline import LayerEncoder
from neuroscope_vllm.engine.serving.self_test import Probe, expected_l0


class SiteSettings(msgspec.Struct, frozen=True):
    """One layer to observe; paths are found."""

    layer: int
    source: str
    info: SAEInfo
    calibration: str | None

    def input_norm(self, settings: Settings) -> str | None:
        """How rows are normalised before the SAE encodes them, as in `SAEInfo`."""
        if self.info.input_norm is None and settings.sae_input == "rms":
            return RMS
        return self.info.input_norm

    def load_calibration(self) -> Calibration | None:
        return Calibration.load(self.calibration) if self.calibration else None


def check_sites(sites: dict[int, SAEInfo], *, d_model: int, num_layers: int) -> None:
    """Raises SAEError if an SAE can not read its layer of the model."""
    for layer, info in sites.items():
        check_fits(info, d_model=d_model, num_layers=num_layers, layer=layer)


def find_sites(
    settings: Settings, model: str, *, d_model: int, num_layers: int, calibrated: bool = True
) -> tuple[list[SiteSettings], dict[int, catalogue.Site]]:
    """The layers to observe, and what there is to steer them with.

    Args:
        model: Folder or hub id.
        calibrated: Whether calibrations are wanted; what makes them needs none.

    Raises:
        ConfigError, SAEError: Something does not fit.
    """
    found = observed(settings)
    check_sites(found, d_model=d_model, num_layers=num_layers)
    sites, steered = [], {}
    for i, (layer, info) in enumerate(found.items()):
        source = settings.sae[i]
        known = None
        if calibrated:
            known = calibration_of(settings, i, info)
            _check_ranking(settings, info, known is not None)
        sae = load_sae(source)  # finds NaN and truncation now rather than in a worker
        if known is not None:
            check_calibration(*known, sae, model)
        steered[layer] = catalogue.Site.of(sae, known[1] if known else None, settings.sae_input)
        calibration = str(known[0]) if known else None
        sites.append(SiteSettings(layer, pinned(source, info.revision), info, calibration))
    return sorted(sites, key=lambda site: site.layer), steered


def _check_ranking(settings: Settings, info: SAEInfo, calibrated: bool) -> None:
    if settings.top_k > info.width:
        raise ConfigError(
            f"top_k is {settings.top_k} but SAE {info.source} has only {info.width} features."
        )
    if not calibrated and settings.ranking not in (None, "activation"):
        raise ConfigError(
            f"ranking {settings.ranking} needs a calibration and SAE {info.source} has none; make"
            " one with `neuroscope calibrate`, or use ranking activation."
        )


def layers_of(settings: Settings, sites: list[SiteSettings]) -> list[int]:
    """Layers in the order of `settings.sae`."""
    layers = {site.info.source: site.layer for site in sites}
    return [layers[source] for source in settings.sae]


def steering_catalogue(
    sites: dict[int, catalogue.Site],
    operator: Operator,
    *,
    d_model: int,
    staged: bool = False,
    drafts: bool = False,
    kv_store: str | None = None,
) -> Catalogue:
    """As `Catalogue.build`. Raises ConfigError if the operator's file can not be used."""
    built = Catalogue.build(
        sites, operator, d_model=d_model, staged=staged, drafts=drafts, kv_store=kv_store
    )
    try:
        settle(SteeringSpec(), built)
        for name in operator.presets:
            settle(SteeringSpec(preset=name), built)
    except SteeringRefused as refusal:
        raise ConfigError(f"the operator's steering file: {refusal}") from None
    return built


class BuiltSite:
    """A site in a worker.

    Attributes:
        device: Where rows are encoded.
        encoder: On that device.
        probe: For the self-test.
        wire: What readers are told of it.
    """

    def __init__(
        self,
        site: SiteSettings,
        sae: SAE,
        settings: Settings,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`device`, `dtype`: of the layer's residuals; `sae`: on the CPU, see `load`."""
        self.device = device
        calibration = site.load_calibration()
        ranking = settings.ranking_of(calibration is not None)
        placed = sae.to(device)
        ranker = make_ranker(
            ranking,
            calibration,
            max_frequency=settings.max_frequency,
            width=sae.info.width,
            device=device,
        )
        # Select in bf16 where the residual itself is; values are recomputed in fp32 either way.
        select = torch.float32 if dtype == torch.float32 else torch.bfloat16
        topk = TopKEncoder(placed, ranker, k=settings.top_k, select_dtype=select)
        sink_norm = calibration.sink_norm if calibration else None
        self.encoder = LayerEncoder(site.layer, topk, sink_norm)
        self.probe = Probe(site.layer, sae, sink_norm, expected_l0(site.info, calibration))
        self.wire = wire.Site(
            layer=site.layer,
            sae=site.info,
            ranking=ranking,
            top_k=topk.k,
            sink_norm=sink_norm,
            dtype=str(dtype).removeprefix("torch."),
            calibration=site.calibration,
            sae_input=settings.sae_input,
            max_frequency=settings.max_frequency,
            dense=calibration.dense if calibration else [],
        )


def load(site: SiteSettings, settings: Settings) -> SAE:
    """On the CPU."""
    loaded = load_sae(site.source)
    return loaded.reading_rms() if settings.sae_input == "rms" else loaded
