"""The hooks: what a worker of vLLM does around a forward pass, around one of transformers'."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.steering.catalogue import Operator
from neuroscope_vllm.core.steering.settled import Steering
from neuroscope_vllm.engine.hf.hooks import at_layer
from neuroscope_vllm.engine.hf.loading import decoder_layers
from neuroscope_vllm.engine.serving.pipeline import EncodePipeline
from neuroscope_vllm.engine.serving.self_test import verdict
from neuroscope_vllm.engine.serving.sites import BuiltSite, SiteSettings, load
from neuroscope_vllm.engine.serving.steer_rows import steer
from neuroscope_vllm.engine.serving.steer_tables import SteerTables
from neuroscope_vllm.engine.serving.steerer import Steerer
from neuroscope_vllm.engine.serving.step import StepView

logger = logging.getLogger(__name__)

LENT_ROWS = 4096
"""Rows on CUDA that may wait for the encoder before some are dropped."""


class ModelWatch:
    """Edits and encodes the rows of the sequence that runs; of none, the model is as without.

    Attributes:
        note: What readers should know of where rows are encoded, if anything.
        position: Of the next row: how many of the sequence have run.
        logits: [n, vocabulary] of the last forward pass, raw, if they are wanted.
    """

    def __init__(
        self,
        whole: Any,
        model: str,
        sites: Sequence[SiteSettings],
        settings: Settings,
        operator: Operator,
        *,
        max_rows: int,
        send: Callable[[wire.StepFeatures], object],
        stop: Callable[[str, str], object],
        engine: str,
    ) -> None:
        """
        Args:
            whole: A causal language model, on its device.
            model: Its name, for errors.
            max_rows: Most tokens of a forward pass.
            send, stop, engine: As of `EncodePipeline`.
        """
        layers = decoder_layers(whole, model)
        saes = {site.layer: load(site, settings) for site in sites}
        weights = {layer: next(layers[layer].parameters()) for layer in saes}
        dtypes = {layer: weight.dtype for layer, weight in weights.items()}
        self._device = next(iter(weights.values())).device
        self.note: str | None = None
        self.built, self._encode_on = self._build(sites, saes, settings, dtypes)
        with torch.device(
            "cpu"
        ):  # small numbers, which a device would be asked for again and again
            self._tables = SteerTables(
                {site.layer: site.input_norm(settings) for site in sites},
                num_rows=max_rows,
                d_model=whole.config.get_text_config().hidden_size,
                entries=1,
                vectors_on=self._device,
            )
        sink_norms = {s.layer: s.sink_norm for s in (b.probe for b in self.built) if s.sink_norm}
        directions = {name: one.read() for name, one in operator.directions.items()}
        self.steerer = Steerer(self._tables, saes, directions, sink_norms)
        self.pipeline = EncodePipeline(
            [site.encoder for site in self.built],
            send,
            engine,
            num_layers=len(self.built),
            device=self._encode_on,
            max_pending_rows=LENT_ROWS + max_rows,
            stop=stop,
        )
        self.position = 0
        self.logits: Tensor | None = None
        self._name: str | None = None
        self._wants_logits = self._wants_prompt_logits = False
        self._before: Callable[[], object] = lambda: None
        self._step: StepView | None = None
        self._rows: dict[int, Tensor] = {}
        self._whole = whole
        self._layers = layers
        whole.register_forward_pre_hook(self._call, with_kwargs=True)
        whole.register_forward_hook(self._called)
        decoder = whole.get_decoder()
        decoder.register_forward_pre_hook(self._begin_step, with_kwargs=True)
        decoder.register_forward_hook(self._end_step)
        for site in self.built:
            layer = site.probe.layer
            layers[layer].register_forward_hook(functools.partial(self._at, layer))

    def _build(
        self,
        sites: Sequence[SiteSettings],
        saes: dict[int, SAE],
        settings: Settings,
        dtypes: dict[int, torch.dtype],
    ) -> tuple[list[BuiltSite], torch.device]:
        """The sites, and where their rows are encoded: beside the layer, or on the CPU where the
        device can not do it as the CPU does."""

        def on(device: torch.device) -> list[BuiltSite]:
            return [
                BuiltSite(site, saes[site.layer], settings, device=device, dtype=dtypes[site.layer])
                for site in sites
            ]

        on_cpu = torch.device("cpu")
        if self._device == on_cpu:
            return on(on_cpu), on_cpu
        why = "gives other features than the CPU"
        try:
            built = on(self._device)
            if all(map(_encodes_alike, built, on(on_cpu))):
                return built, self._device
        except (RuntimeError, TypeError) as error:  # an operation, or a dtype, that it has not
            why = f"can not encode ({str(error).splitlines()[0]})"
        self.note = (
            f"the {self._device.type} device {why}: features are encoded on the CPU, which is"
            " slower. A newer PyTorch may do."
        )
        logger.warning("neuroscope: %s", self.note)
        return on(on_cpu), on_cpu

    @contextmanager
    def sequence(
        self,
        name: str,
        steering: Steering | None,
        prompt_length: int,
        *,
        before: Callable[[], object],
        logits: bool = False,
        prompt_logits: bool = False,
    ) -> Iterator[None]:
        """Inside, what the model runs is this sequence, from its first token on.

        Args:
            before: Called before each forward pass.
            logits, prompt_logits: Whether `logits` are kept, and whether of the prompt too.
        """
        if steering is not None:
            self.steerer.begin(name, steering, prompt_length)
        self._name, self.position, self._before = name, 0, before
        self._wants_logits, self._wants_prompt_logits = logits or prompt_logits, prompt_logits
        try:
            yield
        finally:
            self.steerer.ran()
            self.steerer.forget(name)
            self._name, self._step, self.logits, self._rows = None, None, None, {}

    @torch.inference_mode()
    def test(self, token_ids: list[int]) -> list[wire.SelfTest]:
        """The verdict of each layer on a known text."""
        seen: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> None:
            seen[layer] = hidden[0].float().cpu()

        probes = [site.probe for site in self.built]
        with ExitStack() as stack:
            for probe in probes:
                layer = self._layers[probe.layer]
                stack.enter_context(at_layer(layer, functools.partial(keep, probe.layer)))
            ids = torch.tensor([token_ids], device=self._device)
            self._whole.get_decoder()(input_ids=ids, use_cache=False)
        return [verdict(seen[probe.layer], probe, known_text=True) for probe in probes]

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._name is not None and self._wants_prompt_logits and self.position == 0:
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._name is not None and self._wants_logits:
            self.logits = output.logits[0].float()

    def _begin_step(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._name is None:
            return
        self._before()
        token_ids = (kwargs["input_ids"] if "input_ids" in kwargs else args[0])[0]
        count = len(token_ids)
        positions = torch.arange(self.position, self.position + count, device=token_ids.device)
        self._step = StepView([self._name], [0, count], positions, token_ids, [self.position])
        self.steerer.prepared(self._step)

    def _at(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._step is None:
            return
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        rows = hidden[0]
        steer(rows, None, *self._tables.of_layer(layer))  # in place: what later layers read
        self._rows[layer] = rows

    def _end_step(self, module: nn.Module, args: Any, output: Any) -> None:
        step = self._step
        if step is None:
            return
        self._step = None
        found = self.steerer.found(step, self._rows.__getitem__)
        if self._encode_on != self._device:
            step = replace(
                step,
                positions=step.positions.to(self._encode_on),
                token_ids=step.token_ids.to(self._encode_on),
            )
        rows = [self._rows[site.probe.layer].to(self._encode_on) for site in self.built]
        self.pipeline.submit(step, rows, found)
        self.steerer.ran()
        self.position += step.num_rows


TRIED_ROWS = 16


def _encodes_alike(site: BuiltSite, on_cpu: BuiltSite) -> bool:
    """Whether the best features of rows that look like residuals are those of the CPU."""
    sae = on_cpu.probe.sae
    draw = torch.Generator().manual_seed(0)
    some = torch.randint(sae.width, (TRIED_ROWS, 8), generator=draw)
    scale = 2 * sae.threshold[some].clamp(min=1.0)
    rows = (scale[..., None] * sae.W_dec[some]).sum(1) + sae.b_dec
    theirs = site.encoder.encode(rows.to(site.device)).cpu()
    packed = on_cpu.encoder.encode(rows)
    k = site.encoder.topk.k
    alike = (theirs[:, :k] == packed[:, :k]).float().mean() > 0.9  # ties apart
    values = theirs[:, k : 2 * k].view(torch.float32), packed[:, k : 2 * k].view(torch.float32)
    return bool(alike) and torch.allclose(*values, rtol=1e-2, atol=1e-2)
