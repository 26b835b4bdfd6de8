"""The self-test at start: a known text through the engine, its rows through the SAE, a verdict.

The engine core sends one request of its own through scheduler and model before it takes any other
(`run`), so the rows come the way every request's rows come. Workers gather them (`SelfTest`);
they never leave. A dead hook stops the server; a doubtful fit of SAE and model is a warning.
"""

from __future__ import annotations

import enum
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.sae.sparse import Reconstruction
from neuroscope_vllm.engine.vllm.pipeline import LayerEncoder
from neuroscope_vllm.engine.vllm.settings import worker_settings
from neuroscope_vllm.engine.vllm.step import StepView

logger = logging.getLogger(__name__)

REQUEST_ID = "neuroscope-self-test"
BEGIN_RPC, END_RPC = "neuroscope_begin_self_test", "neuroscope_end_self_test"
MAX_TOKENS = 128
TIMEOUT_S = 300.0

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

_STALE = (
    "turn vLLM's compile cache off (VLLM_DISABLE_COMPILE_CACHE=1) and look for other plugins that"
    " replace the model"
)


@dataclass(frozen=True, slots=True)
class Probe:
    """One observed layer and the SAE to test it with."""

    encoder: LayerEncoder
    sae: SAE  # on the CPU: its decoder would cost a GPU's KV cache
    expected_l0: float | None

    @property
    def layer(self) -> int:
        return self.encoder.layer

    @property
    def buffer(self) -> Tensor:
        """[max_rows, d_model], the hook's."""
        return self.encoder.rows


def expected_l0(info: SAEInfo, calibration: Calibration | None) -> float | None:
    """Mean active features a token, as measured by the calibration or written by the publisher."""
    if calibration is not None:
        return float(calibration.frequency.sum())
    named = re.search(r"average_l0_(\d+)", info.source)
    return float(named[1]) if named else None


def verdict(rows: Tensor, probe: Probe, known_text: bool) -> wire.SelfTest:
    """Judge the residuals [n, d_model] of positions 0 to n - 1 of the self-test's request.

    `failure` where nothing read from this hook could be true: rows that were not written, are not
    finite, are zero, or are the same whatever the token.

    `warning` where SAE and model hardly belong together: L0 beyond a factor of `L0_FACTOR` from
    its mean over a corpus, or too little variance explained. The demo's SAE has 1.01 times its
    mean L0 on this text and explains 0.81; published ones explain 0.6 to 0.9. Read from the wrong
    layer it explains 0.62 (one off), 0.38 (three off), 0.16 (ten off), from residuals of twice
    the scale 0.25; a few layers further up L0 is 4 to 30 times its mean.

    `known_text` is False for arbitrary token ids: then there is nothing to compare with.
    """
    rows = rows.float()
    if (rows == UNWRITTEN).all(dim=1).any():
        why, advice = "wrote nothing while a known text ran; the compiled model lacks it", _STALE
    elif not rows.isfinite().all():
        why = "shows residuals that are not finite on a known text"
        advice = "check the model's weights, or try another --dtype"
    elif not rows.any():
        why, advice = "shows only zeros on a known text", _STALE
    elif len(rows) > 1 and (rows == rows[0]).all():
        why, advice = "shows the same residual at every position of a known text", _STALE
    else:
        return _statistics(rows, probe, known_text)
    failure = (
        f"self-test failed: the activation hook of layer {probe.layer} {why}, so its features"
        f" would be false; {advice}."
    )
    return wire.SelfTest(layer=probe.layer, failure=failure)


def _statistics(rows: Tensor, probe: Probe, known_text: bool) -> wire.SelfTest:
    keep = torch.arange(len(rows)) > 0
    if probe.encoder.sink_norm is not None:
        keep &= torch.linalg.vector_norm(rows, dim=1) <= probe.encoder.sink_norm
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


class _Phase(enum.Enum):
    WARM_UP = enum.auto()
    RUNNING = enum.auto()
    OVER = enum.auto()


class SelfTest:
    """A worker's part. Steps before it are vLLM's warm-up and go nowhere; its own are gathered."""

    def __init__(self, probes: list[Probe], on_step: Callable[[StepView], None]) -> None:
        """`on_step` takes all steps after the test."""
        self.results: list[wire.SelfTest] = []
        self._on_step = on_step
        self._probes = probes
        self._rows: list[list[Tensor]] = [[] for _ in probes]
        self._phase = _Phase.WARM_UP

    @property
    def passed(self) -> bool:
        return bool(self.results) and not any(result.failure for result in self.results)

    @property
    def warnings(self) -> list[str]:
        if self._phase is not _Phase.OVER:
            return ["the self-test has not run yet."]
        found = (result.failure or result.warning for result in self.results)
        return [text for text in found if text]

    def on_step(self, step: StepView) -> None:
        """Called after each forward pass, on the runner's thread."""
        if self._phase is _Phase.OVER:
            self._on_step(step)
        elif self._phase is _Phase.RUNNING and REQUEST_ID in step.request_ids:
            for probe, rows in zip(self._probes, self._rows, strict=True):
                rows.append(probe.buffer[: step.num_rows].clone())
            self._erase()

    def begin(self) -> None:
        self._erase()
        self._phase = _Phase.RUNNING

    def end(self, tokens: int, known_text: bool) -> list[str]:
        """Judge, with every one of the text's rows in; returns the sentences of what failed.

        `tokens`: length of the text; the pass over the token sampled after it is not looked at.
        """
        with torch.inference_mode():
            for probe, rows in zip(self._probes, self._rows, strict=True):
                seen = torch.cat([*rows, probe.buffer[:0]])[:tokens].cpu()
                missing = seen.new_full((tokens - len(seen), seen.shape[1]), UNWRITTEN)
                self.results.append(verdict(torch.cat([seen, missing]), probe, known_text))
        for result in self.results:
            if result.warning:
                logger.warning("neuroscope: %s", result.warning)
        self._phase = _Phase.OVER
        self._probes, self._rows = [], []  # and with them the decoder, which nothing else needs
        return [result.failure for result in self.results if result.failure]

    def _erase(self) -> None:
        with torch.inference_mode():
            for probe in self._probes:
                probe.buffer.fill_(UNWRITTEN)


class SelfTestFailed(RuntimeError):
    """The engine must not serve; the message is one for users."""


def run(core: Any) -> None:
    """Test the engine whose core is `core`, once, before it takes requests. No-op if unconfigured.

    The request goes straight to the scheduler, so no client and no tap hears of it; its salt keeps
    its prefix-cache blocks from every other request, and lookups and their counters are skipped.
    Every data-parallel rank tests itself.

    Raises:
        SelfTestFailed: A hook is dead; vLLM then fails to start.
    """
    if worker_settings(core.vllm_config) is None or core.is_pooling_model:
        return
    if getattr(core, "neuroscope_tested", False):
        return
    core.neuroscope_tested = True
    token_ids, known_text = _token_ids(core.vllm_config.model_config)
    core.model_executor.collective_rpc(BEGIN_RPC)
    _serve(core, token_ids)
    answers = core.model_executor.collective_rpc(END_RPC, args=(len(token_ids), known_text))
    failures = [failure for answer in answers for failure in answer]
    if failures:
        raise SelfTestFailed(f"neuroscope: {' '.join(failures)}")


def _token_ids(model: Any) -> tuple[list[int], bool]:
    """The known text, or a spread of the vocabulary (and False) where there is no tokenizer."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model)
    if tokenizer is None:
        token_ids = torch.linspace(0, model.get_vocab_size() - 1, MAX_TOKENS).long().tolist()
    else:
        token_ids = tokenizer.encode(TEXT)
    return token_ids[: min(MAX_TOKENS, model.max_model_len - 1)], tokenizer is not None


def _serve(core: Any, token_ids: list[int]) -> None:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True)
    request = Request(
        REQUEST_ID,
        token_ids,
        params,
        None,
        cache_salt=uuid.uuid4().hex,
        block_hasher=core.request_block_hasher,
    )
    core.scheduler.add_request(request)
    deadline = time.monotonic() + TIMEOUT_S
    while core.scheduler.has_requests() or core.batch_queue:
        if time.monotonic() > deadline:
            raise SelfTestFailed(
                f"neuroscope: self-test failed: {len(token_ids)} tokens were not through the model"
                f" after {TIMEOUT_S:.0f} s; leave neuroscope unconfigured to see whether vLLM"
                " serves at all."
            )
        _, executed = core.step_fn()
        core.post_step(executed)
