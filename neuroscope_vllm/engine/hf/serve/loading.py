"""The model on its device, the SAEs beside it, and both tried on a known text."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import uuid
from pathlib import Path
from typing import Any

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.errors import ConfigError, EngineError
from neuroscope_vllm.core.guide import check_presets
from neuroscope_vllm.core.sae.observed import named
from neuroscope_vllm.core.sender import Sender
from neuroscope_vllm.core.steering.catalogue import Operator
from neuroscope_vllm.engine.hf.device import Placement
from neuroscope_vllm.engine.hf.loading import decoder_layers, load_config, load_whole, placed
from neuroscope_vllm.engine.hf.serve.answering import Served
from neuroscope_vllm.engine.hf.serve.generation import Generator
from neuroscope_vllm.engine.hf.serve.spec import ServeSpec
from neuroscope_vllm.engine.hf.serve.watch import ModelWatch
from neuroscope_vllm.engine.serving.pipeline import device_name
from neuroscope_vllm.engine.serving.requests import RequestLog
from neuroscope_vllm.engine.serving.self_test import MAX_TOKENS, TEXT
from neuroscope_vllm.engine.serving.sites import find_sites, layers_of, steering_catalogue
from neuroscope_vllm.engine.serving.steer_commands import SteerCommands

logger = logging.getLogger(__name__)


def load(spec: ServeSpec) -> Loaded:
    """Raises ConfigError, SAEError, EngineError: one sentence says what does not fit."""
    return Loaded(
        spec,
        load_config(spec.model).get_text_config(),
        placed(spec.model, spec.device, spec.dtype),
    )


class Loaded:
    """A model that can be connected to a hub."""

    def __init__(self, spec: ServeSpec, config: Any, placement: Placement) -> None:
        self._spec = spec
        self._settings = named(spec.settings, spec.model)
        self._sites, steered = find_sites(
            self._settings,
            spec.model,
            d_model=config.hidden_size,
            num_layers=config.num_hidden_layers,
        )
        self._operator = Operator.load(self._settings.steering)
        check_presets(self._settings, self._operator.presets)
        self._catalogue = steering_catalogue(steered, self._operator, d_model=config.hidden_size)
        self._max_model_len = _context(spec.max_model_len, config.max_position_embeddings)
        self._placement = placement
        dtype = str(placement.dtype).removeprefix("torch.")
        logger.info("neuroscope: loading %s on %s in %s", spec.model, placement.device, dtype)
        self._whole, self._tokenizer = load_whole(spec.model, placement)
        decoder_layers(self._whole, spec.model)

    @property
    def layers_in_order(self) -> list[int]:
        """Of the SAEs, as they were given."""
        return layers_of(self._settings, self._sites)

    def tokenizer_file(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        self._tokenizer.backend_tokenizer.save(str(path))
        return path

    def connect(self, endpoint: str) -> Served:
        """Tell the hub at `endpoint` of what is served from now on.

        Raises EngineError: The self-test failed.
        """
        engine = f"transformers-{uuid.uuid4().hex[:5]}-0"
        host, device = socket.gethostname(), device_name(self._placement.device)
        state: dict[str, Any] = {"armed": False, "self_test": [], "warnings": []}

        def hello(counters: dict[str, int]) -> wire.Hello:
            return wire.Hello(
                sender=f"worker-{engine}-{os.getpid()}",
                role="worker",
                engine=engine,
                dp_rank=0,
                model=self._spec.name,
                armed=state["armed"] and not watch.pipeline.failing,
                host=host,
                device=device,
                runner="transformers",
                cudagraph_mode="NONE",
                sites=[site.wire for site in watch.built],
                warnings=state["warnings"],
                counters={**counters, **watch.pipeline.counters},
                self_test=state["self_test"],
            )

        sender = Sender(endpoint, hello)
        watch = ModelWatch(
            self._whole,
            self._spec.model,
            self._sites,
            self._settings,
            self._operator,
            max_rows=self._max_model_len,
            send=sender.put,
            stop=lambda internal_id, rule: generator.note_rule(internal_id, rule),
            engine=engine,
        )
        self._test(watch, state)
        log = RequestLog(
            endpoint,
            engine=engine,
            dp_rank=0,
            model=self._spec.name,
            command=lambda data: commands.command(data),
        )
        commands = SteerCommands(
            lambda: self._catalogue, log.steering_changed, lambda name: name in log.live
        )
        generator = Generator(
            self._whole,
            self._tokenizer,
            watch,
            log,
            commands,
            engine=engine,
            max_model_len=self._max_model_len,
        )
        for one in (sender, log.sender):
            one.start()
            atexit.register(one.close)
        return Served(generator, self._catalogue, self._spec.name)

    def _test(self, watch: ModelWatch, state: dict[str, Any]) -> None:
        most = min(MAX_TOKENS, self._max_model_len)
        results = watch.test(self._tokenizer.encode(TEXT)[:most])
        failures = [one.failure for one in results if one.failure]
        if failures:
            raise EngineError(" ".join(failures))
        state["self_test"], state["armed"] = results, True
        doubts = [one.warning for one in results if one.warning]
        for doubt in doubts:
            logger.warning("neuroscope: %s", doubt)
        notes = (self._placement.note, watch.note)
        state["warnings"] = [*doubts, *(note for note in notes if note)]


def _context(asked: int | None, made_for: int) -> int:
    if asked is not None and not 2 <= asked <= made_for:
        raise ConfigError(
            f"--max-model-len is {asked}; it must lie between 2 and the {made_for} tokens that the"
            " model was made for."
        )
    return asked or made_for
