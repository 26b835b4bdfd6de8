"""The hooks: what a worker of vLLM does around a forward pass, around one of transformers'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.steering.catalogue import Operator
from neuroscope_vllm.core.steering.settled import Steering
from neuroscope_vllm.engine.hf.hooks import at_layer
from neuroscope_vllm.engine.hf.oracle import decoder_layers
from neuroscope_vllm.engine.serving.pipeline import EncodePipeline
from neuroscope_vllm.engine.serving.self_test import verdict
from neuroscope_vllm.engine.serving.sites import BuiltSite, SiteSettings, load
from neuroscope_vllm.engine.serving.steer_rows import steer
from neuroscope_vllm.engine.serving.steer_tables import SteerTables
from neuroscope_vllm.engine.serving.steerer import Steerer
from neuroscope_vllm.engine.serving.step import StepView

LENT_ROWS = 4096
"""Rows on CUDA that may wait for the encoder before some are dropped."""


class ModelWatch:
    """Edits and encodes the rows of the sequence that runs; of none, the model is as without.

    Attributes:
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
        self.built = [
            BuiltSite(
                site,
                saes[site.layer],
                settings,
                device=weights[site.layer].device,
                dtype=weights[site.layer].dtype,
            )
            for site in sites
        ]
        self._device = next(iter(weights.values())).device
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
            device=self._device,
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
        self.pipeline.submit(step, [self._rows[s.probe.layer] for s in self.built], found)
        self.steerer.ran()
        self.position += step.num_rows
