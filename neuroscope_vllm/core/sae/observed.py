"""From the settings to the SAE of each observed layer, and its calibration."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae import canonical
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.load import read_sae_info
from neuroscope_vllm.core.sae.sae import SAE

logger = logging.getLogger(__name__)


def named(settings: Settings, model: str) -> Settings:
    """With the canonical SAE's address in place of its suite's name.

    Raises:
        ConfigError, SAEError: A suite without a layer, or none for this model.
    """
    if canonical.SUITE not in settings.sae:
        return settings
    if not settings.layer:
        raise ConfigError(
            f"sae is {canonical.SUITE} and no layer is given; say which layer of the model to"
            " observe, for example 20."
        )
    return msgspec.structs.replace(
        settings,
        sae=[
            canonical.canonical_source(model, layer) if source == canonical.SUITE else source
            for source, layer in zip(settings.sae, settings.layer, strict=True)
        ],
    )


def observed(settings: Settings) -> dict[int, SAEInfo]:
    """The SAE of each layer, in the order of `settings.sae`.

    Raises:
        ConfigError: An SAE records no layer and none is given, or two read one layer.
        SAEError, DownloadError: An SAE can not be read.
    """
    found: dict[int, SAEInfo] = {}
    for i, source in enumerate(settings.sae):
        info = read_sae_info(source)
        layer = settings.layer[i] if settings.layer else info.layer
        if layer is None:
            raise ConfigError(f"SAE {source} does not record its layer; give one with layer.")
        if layer in found:
            raise ConfigError(f"two SAEs read layer {layer}; give one SAE per layer.")
        found[layer] = info
    return found


def calibration_of(
    settings: Settings, number: int, info: SAEInfo
) -> tuple[Path, Calibration] | None:
    """The calibration of the SAE `settings.sae[number]`, and its file.

    As given, else the user's own, else the one that ships beside the SAE; None: there is none.

    Raises:
        ConfigError: It can not be used, or was made with another SAE or `sae_input`.
    """
    given = settings.calibration[number] if settings.calibration else None
    path = (
        Path(given)
        if given
        else artefacts.find_calibration(settings.sae[number], settings.sae_input)
    )
    if path is None:
        return None
    calibration = Calibration.load(path)
    if calibration.width != info.width:
        raise ConfigError(
            f"calibration {path} is of {calibration.width} features but SAE {info.source} has"
            f" {info.width}; use the calibration made with this SAE."
        )
    if calibration.sae_input != settings.sae_input:
        raise ConfigError(
            f"calibration {path} was made with sae_input {calibration.sae_input}, but sae_input is"
            f" {settings.sae_input}; make one with `neuroscope calibrate --sae-input"
            f" {settings.sae_input}`."
        )
    if calibration.tokens == 0:
        raise ConfigError(f"calibration {path} saw no tokens; use one made on a corpus.")
    return path, calibration


def check_calibration(path: Path, calibration: Calibration, sae: SAE, model: str) -> None:
    """Check that a calibration is of these weights; warn if it was made on another model.

    Raises:
        ConfigError: The SAE's weights are not those that were calibrated.
    """
    if calibration.sae_digest not in ("", sae.digest):
        raise ConfigError(
            f"calibration {path} was made with other weights than SAE {sae.info.source} has now;"
            " calibrate again with `neuroscope calibrate`, or delete it."
        )
    if not same_model(calibration.model, model):
        logger.warning(
            "neuroscope: calibration %s was made on %s, and this is %s; make one on it with"
            " `neuroscope calibrate`.",
            path,
            calibration.model or "an unnamed model",
            model,
        )


def same_model(one: str, other: str) -> bool:
    """By their last words: a hub id and a folder may name the same model."""
    last, others = (name.rstrip("/").rpartition("/")[2].casefold() for name in (one, other))
    return last == others
