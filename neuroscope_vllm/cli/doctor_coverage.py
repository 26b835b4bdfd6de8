"""`neuroscope doctor`: how much of the features labels and calibrations cover."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from neuroscope_vllm.cli.doctor_check import Asked, Check, Section

if TYPE_CHECKING:
    from neuroscope_vllm.cli.doctor_model import Known

FEW_TOKENS = 100_000
"""Below, a feature of frequency 1e-4 has fired ten times."""
LARGEST_READ = 1 << 30
"""Bytes of an SAE's weights that are read to compare digests."""


def coverage_checks(asked: Asked, known: list[Known]) -> list[Check]:
    section = Section("coverage", "labels", "calibration_tokens", "sink_norm", "digest")
    settings = asked.observing
    for one in known:
        _labels(section, one, list(settings.labels) if settings and one is known[0] else [])
        if one.calibration is None:
            for name in ("calibration_tokens", "sink_norm", "digest"):
                section.skip(name, "there is no calibration that fits", one.source)
        else:
            _calibration(section, one, asked.model)
            _digest(section, one, asked.model)
    return section.done("no SAE was read")


def _labels(section: Section, one: Known, given: list[str]) -> None:
    """`given`: label files that are used in place of the stored ones."""
    from neuroscope_vllm.core.errors import NeuroscopeError
    from neuroscope_vllm.core.labels import load_labels, stored_labels

    try:
        sets = [load_labels(path) for path in given] or list(stored_labels(one.source).values())
    except NeuroscopeError:
        section.skip("labels", "a label file can not be used, see configuration", one.source)
        return
    width = one.info.width
    beyond = [found for found in sets if any(label.index >= width for label in found)]
    for found in beyond:
        section.fail(
            "labels",
            f"labels of {found.labeller} name features beyond the SAE's {width}, so they are of"
            " another SAE.",
            "Remove them (neuroscope labels remove), or give labels of this SAE.",
            one.source,
        )
    if not sets:
        section.warn(
            "labels",
            "there are none, so features are shown by index alone.",
            f"Make some: neuroscope label --sae {one.source}, or take some over with neuroscope"
            " labels import.",
            one.source,
        )
    elif not beyond:
        shown = ", ".join(f"{found.labeller} {len(found) / width:.0%}" for found in sets)
        section.ok("labels", f"share of features labelled: {shown}", one.source)


def _calibration(section: Section, one: Known, model: str | None) -> None:
    assert one.calibration is not None
    again = f"Calibrate on more text: neuroscope calibrate {model or 'MODEL'} --sae {one.source}."
    tokens = one.calibration.tokens
    seen = f"{tokens:,} tokens, {len(one.calibration.dense)} dense features"
    if tokens < FEW_TOKENS:
        short = f"{seen}; how often rare features fire is not known from so few."
        section.warn("calibration_tokens", short, again, one.source)
    else:
        section.ok("calibration_tokens", seen, one.source)
    cut, sinks = one.calibration.sink_norm, one.calibration.sinks
    if math.isfinite(cut):
        seen = f"residuals of norm above {cut:.4g} are attention sinks; {sinks:,} were left out"
        section.ok("sink_norm", seen, one.source)
    else:
        section.warn(
            "sink_norm",
            "the calibration has no cut, so attention sinks are ranked like other tokens.",
            again,
            one.source,
        )


def _digest(section: Section, one: Known, model: str | None) -> None:
    """Are these the weights that were calibrated? The one check that reads weights."""
    from neuroscope_vllm.core.errors import NeuroscopeError
    from neuroscope_vllm.core.sae import load_sae
    from neuroscope_vllm.core.sae.formats import load_tensors

    assert one.calibration is not None
    size = 8 * one.info.width * one.info.d_model
    if not one.calibration.sae_digest:
        section.skip("digest", "the calibration does not say of which weights", one.source)
        return
    if size > LARGEST_READ:
        reason = f"{size / 2**30:.1f} GiB of weights are not read for this; the server does so"
        section.skip("digest", reason, one.source)
        return
    again = f"Calibrate again: neuroscope calibrate {model or 'MODEL'} --sae {one.source}."
    try:
        digest = (load_tensors(*one.cached) if one.cached else load_sae(one.source)).digest
    except NeuroscopeError as error:
        section.fail("digest", str(error), "Fetch or save the SAE again.", one.source)
        return
    if digest == one.calibration.sae_digest:
        section.ok("digest", f"the calibration is of these weights ({digest})", one.source)
    else:
        seen = f"the weights are {digest}, the calibration's {one.calibration.sae_digest}."
        section.fail("digest", seen, again, one.source)
