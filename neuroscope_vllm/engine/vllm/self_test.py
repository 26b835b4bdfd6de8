"""The self-test at start, in vLLM: a known text through the engine, its rows through the SAE.

The engine core sends one request of its own through scheduler and model before it takes any other
(`run`), so the rows come the way every request's rows come. Workers gather them (`SelfTest`);
they never leave.
"""

from __future__ import annotations

import enum
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuroscope_vllm.core import wire
from neuroscope_vllm.engine.serving.self_test import (
    MAX_TOKENS,
    TEXT,
    UNWRITTEN,
    Probe,
    verdict,
)
from neuroscope_vllm.engine.serving.step import StepView
from neuroscope_vllm.engine.vllm.settings import worker_settings

logger = logging.getLogger(__name__)

REQUEST_ID = "neuroscope-self-test"
BEGIN_RPC, END_RPC = "neuroscope_begin_self_test", "neuroscope_end_self_test"
TIMEOUT_S = 300.0

_STALE = (
    "turn vLLM's compile cache off (VLLM_DISABLE_COMPILE_CACHE=1) and look for other plugins that"
    " replace the model"
)


class _Phase(enum.Enum):
    WARM_UP = enum.auto()
    RUNNING = enum.auto()
    OVER = enum.auto()


class SelfTest:
    """A worker's part. Steps before it are vLLM's warm-up and go nowhere; its own are gathered."""

    def __init__(
        self, probes: list[Probe], buffers: list[Tensor], on_step: Callable[[StepView], None]
    ) -> None:
        """`buffers`: of each probe's layer, the hook's [max_rows, d_model]; `on_step` takes all
        steps after the test."""
        self.results: list[wire.SelfTest] = []
        self._on_step = on_step
        self._probes, self._buffers = probes, buffers
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
            for buffer, rows in zip(self._buffers, self._rows, strict=True):
                rows.append(buffer[: step.num_rows].clone())
            self._erase()

    def begin(self) -> None:
        self._erase()
        self._phase = _Phase.RUNNING

    def end(self, tokens: int, known_text: bool) -> list[str]:
        """Judge, with every one of the text's rows in; returns the sentences of what failed.

        `tokens`: length of the text; the pass over the token sampled after it is not looked at.
        """
        with torch.inference_mode():
            for probe, buffer, rows in zip(self._probes, self._buffers, self._rows, strict=True):
                seen = torch.cat([*rows, buffer[:0]])[:tokens].cpu()
                missing = seen.new_full((tokens - len(seen), seen.shape[1]), UNWRITTEN)
                whole = torch.cat([seen, missing])
                self.results.append(verdict(whole, probe, known_text, _STALE))
        for result in self.results:
            if result.warning:
                logger.warning("neuroscope: %s", result.warning)
        self._phase = _Phase.OVER
        self._probes, self._buffers, self._rows = (
            [],
            [],
            [],
        )  # and with them the decoder, which nothing else needs
        return [result.failure for result in self.results if result.failure]

    def _erase(self) -> None:
        with torch.inference_mode():
            for buffer in self._buffers:
                buffer.fill_(UNWRITTEN)


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
