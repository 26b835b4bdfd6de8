"""The self-test at start: what a known text's residuals say of hook, SAE and model.

A dead hook stops the server; a doubtful fit of SAE and model is a warning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sae.sparse import Reconstruction

MAX_TOKENS = 128

TEXT = """\
The harbour town lies at the mouth of a slow river. In 1874 its council built a stone bridge, and \
two years later the railway arrived, so that fish caught at night could be sold in the capital by \
noon. Most families still own a small boat. On Saturdays farmers bring apples, cheese and honey to \
the square, while children play near the fountain and their parents talk about prices, the weather \
and the next election. Water boils at 100 degrees Celsius at sea level; on the hill behind the \
town it boils a little earlier, because the air is thinner there. The teacher who explains this \
every spring also keeps the museum's records, which describe each storm, each harvest and every \
ship that was lost."""
"""Ours, neutral and ordinary: prose, names of things, a number or two."""

UNWRITTEN = -32768.0
"""What observed buffers hold before each step of the test; exact in every float dtype. A row that
still holds nothing else afterwards was not written by the hook."""

MIN_ROWS = 16
"""Fewer rows say too little for statistics."""
L0_FACTOR = 3.0
MIN_EXPLAINED = 0.4
"""Bounds of what passes without a warning, see `verdict`."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One observed layer and the SAE to test it with.

    Attributes:
        sae: On the CPU: its decoder would cost a GPU's KV cache.
        sink_norm: Rows with a larger norm are left out.
        expected_l0: See `expected_l0`.
    """

    layer: int
    sae: SAE
    sink_norm: float | None
    expected_l0: float | None


def expected_l0(info: SAEInfo, calibration: Calibration | None) -> float | None:
    """Mean active features a token, as measured by the calibration or written by the publisher."""
    if calibration is not None:
        return float(calibration.frequency.sum())
    named = re.search(r"average_l0_(\d+)", info.source)
    return float(named[1]) if named else None


def verdict(
    rows: Tensor, probe: Probe, known_text: bool, advice: str = "look for what replaces the model"
) -> wire.SelfTest:
    """Judge the residuals [n, d_model] of positions 0 to n - 1 of the self-test's request.

    `failure` where nothing read from this hook could be true: rows that were not written, are not
    finite, are zero, or are the same whatever the token.

    `warning` where SAE and model hardly belong together: L0 beyond a factor of `L0_FACTOR` from
    its mean over a corpus, or too little variance explained. The demo's SAE has 1.01 times its
    mean L0 on this text and explains 0.81; published ones explain 0.6 to 0.9. Read from the wrong
    layer it explains 0.62 (one off), 0.38 (three off), 0.16 (ten off), from residuals of twice
    the scale 0.25; a few layers further up L0 is 4 to 30 times its mean.

    `known_text` is False for arbitrary token ids: then there is nothing to compare with. `advice`
    is what to do about a hook that shows nothing true.
    """
    rows = rows.float()
    if (rows == UNWRITTEN).all(dim=1).any():
        why = "wrote nothing while a known text ran; the model that runs lacks it"
    elif not rows.isfinite().all():
        why = "shows residuals that are not finite on a known text"
        advice = "check the model's weights, or try another --dtype"
    elif not rows.any():
        why = "shows only zeros on a known text"
    elif len(rows) > 1 and (rows == rows[0]).all():
        why = "shows the same residual at every position of a known text"
    else:
        return _statistics(rows, probe, known_text)
    failure = (
        f"self-test failed: the activation hook of layer {probe.layer} {why}, so its features"
        f" would be false; {advice}."
    )
    return wire.SelfTest(layer=probe.layer, failure=failure)


def _statistics(rows: Tensor, probe: Probe, known_text: bool) -> wire.SelfTest:
    keep = torch.arange(len(rows)) > 0
    if probe.sink_norm is not None:
        keep &= torch.linalg.vector_norm(rows, dim=1) <= probe.sink_norm
    rows = rows[keep]
    if not known_text or len(rows) < MIN_ROWS:
        return wire.SelfTest(layer=probe.layer)
    fit = Reconstruction.empty(probe.sae.d_model)
    fit.update(probe.sae, rows)
    l0, explained = fit.l0, fit.explained_variance
    expected = probe.expected_l0
    doubts = []
    if l0 == 0 or (expected and not expected / L0_FACTOR <= l0 <= expected * L0_FACTOR):
        usual = f" instead of about {expected:.0f}" if expected else ""
        doubts.append(f"{l0:.1f} features are active a token{usual}")
    if explained < MIN_EXPLAINED:
        doubts.append(f"the SAE explains {explained:.2f} of the variance")
    warning = None
    if doubts:
        warning = (
            f"self-test of layer {probe.layer}: on a known text {' and '.join(doubts)}; features"
            f" may mean nothing. Check that {probe.sae.info.source} was trained on this model and"
            " layer, and on residuals as they are (sae_input)."
        )
    return wire.SelfTest(
        layer=probe.layer,
        tokens=len(rows),
        l0=round(l0, 2),
        expected_l0=None if expected is None else round(expected, 2),
        explained_variance=round(explained, 4),
        warning=warning,
    )
