"""Requests one after another through the model, and what the hub is told of them."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.cli.serving.utils import InferenceThread

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.detokenize import OutputText, TextStream
from neuroscope_vllm.core.steering.settled import Steering
from neuroscope_vllm.engine.hf.device import free_memory, is_out_of_memory
from neuroscope_vllm.engine.hf.serve.ask import Ask
from neuroscope_vllm.engine.hf.serve.logprobs import Ranked, ranked
from neuroscope_vllm.engine.hf.serve.sampling import Penalties, generation_config, seed
from neuroscope_vllm.engine.hf.serve.watch import ModelWatch
from neuroscope_vllm.engine.serving.requests import RequestLog
from neuroscope_vllm.engine.serving.steer_commands import Change, SteerCommands

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """What a step adds to an answer. `error`: the answer ends here, with this HTTP status."""

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Ranked, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: tuple[int, str] | None = None


class Generation:
    """One choice of a request, from the queue to its end.

    Attributes:
        begun, over: Whether it left the queue, and whether it will tell no more.
        prompt_logprobs: Once the first piece is there, if they were asked for.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        request_id: str,
        choice: int,
        draw: int,
        name: str,
        prompt_ids: list[int],
        max_tokens: int,
        steering: Steering | None,
        secret: bytes | None,
        wanted_logprobs: int | None,
        tell: Callable[[Piece], object],
    ) -> None:
        """
        Args:
            name: The request's of which this is draw `draw`; an internal id is made of both.
            secret: Digest of the request's stream secret, if it has one.
            tell: Called on the inference thread.
        """
        self.ask = ask
        self.request_id, self.choice, self.draw = request_id, choice, draw
        prefix = f"{draw}_" if ask.n > 1 else ""
        self.internal_id = f"{prefix}{name}-{uuid.uuid4().hex[:8]}"
        self.prompt_ids, self.max_tokens = prompt_ids, max_tokens
        self.steering, self.secret = steering, secret
        self.wanted_logprobs = wanted_logprobs
        self.tell = tell
        self.created = time.time()
        self.begun = self.over = False
        self.cancelled = threading.Event()
        self.stopped_by_rule: str | None = None
        self.prompt_logprobs: list[Ranked] = []

    def started(self, engine: str, layers: list[int]) -> wire.RequestStarted:
        ask, steering = self.ask, self.steering
        return wire.RequestStarted(
            internal_id=self.internal_id,
            request_id=self.request_id,
            choice=self.choice,
            engine=engine,
            dp_rank=0,
            prompt_token_ids=np.asarray(self.prompt_ids, "<i4").tobytes(),
            created=self.created,
            layers=layers,
            stop=ask.stops,
            skip_special_tokens=ask.skip_special_tokens,
            include_stop_str_in_output=ask.include_stop_str_in_output,
            min_tokens=ask.min_tokens,
            spaces_between_special_tokens=ask.spaces_between_special_tokens,
            edited_from=0 if steering else None,
            edit_salt=steering.digest.encode() if steering else b"",
            steering=steering.describe() if steering else None,
            secret=self.secret,
        )


class Generator:
    """The model, its watch, and the queue before it.

    Attributes:
        max_model_len: Longest context.
        vocabulary: How many tokens there are.
    """

    def __init__(
        self,
        whole: Any,
        tokenizer: Any,
        watch: ModelWatch,
        log: RequestLog,
        commands: SteerCommands,
        *,
        engine: str,
        max_model_len: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocabulary: int = whole.config.get_text_config().vocab_size
        self.default: GenerationConfig = whole.generation_config
        # What `generate` would fill in where a request's own says nothing.
        whole.generation_config = GenerationConfig()
        self._whole = whole
        self._watch = watch
        self._log = log
        self._commands = commands
        self._engine = engine
        self._layers = [site.probe.layer for site in watch.built]
        self._thread = InferenceThread()
        self._waiting: deque[Generation] = deque()
        self._running: Generation | None = None
        self._lock = threading.Lock()
        eos = self.default.eos_token_id
        self._eos = [eos] if isinstance(eos, int) else list(eos or [])
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in self._eos:
            self._eos.append(tokenizer.eos_token_id)

    def submit(self, generation: Generation) -> None:
        self._log.started(generation.started(self._engine, self._layers))
        with self._lock:
            self._waiting.append(generation)
        self._thread.submit(self._run_next)

    def ahead(self, generation: Generation) -> int:
        """How many run or wait before it; 0: it runs."""
        with self._lock:
            if generation not in self._waiting:
                return 0
            return self._waiting.index(generation) + (self._running is not None)

    def queue(self) -> list[str]:
        """Internal ids, the one that runs first."""
        with self._lock:
            running = [self._running] if self._running is not None else []
            return [one.internal_id for one in [*running, *self._waiting]]

    def cancel(self, generation: Generation) -> None:
        """Its client has left; of one that runs the next token is the last."""
        generation.cancelled.set()
        with self._lock:
            if generation not in self._waiting:
                return
            self._waiting.remove(generation)
        self._end(generation, "abort", computed=0)

    def note_rule(self, internal_id: str, rule: str) -> None:
        """A rule that ends the answer was met."""
        running = self._running
        if running is not None and running.internal_id == internal_id:
            running.stopped_by_rule = rule

    def _run_next(self) -> None:
        with self._lock:
            if not self._waiting:
                return  # it was cancelled
            generation = self._running = self._waiting.popleft()
        generation.begun = True
        try:
            self._generate(generation)
        except Exception as error:
            self._failed(generation, error)
        finally:
            with self._lock:
                self._running = None

    def _generate(self, generation: Generation) -> None:
        ask, prompt = generation.ask, generation.prompt_ids
        self._log.scheduled(generation.internal_id, 0)
        eos = [] if ask.ignore_eos else [*self._eos, *(ask.stop_token_ids or [])]
        config = generation_config(
            ask, self.default, max_tokens=generation.max_tokens, eos=list(dict.fromkeys(eos))
        )
        penalties = Penalties(ask, len(prompt))
        answer = _Answer(generation, self)
        ids = torch.tensor([prompt], device=self._whole.device)
        with self._watch.sequence(
            generation.internal_id,
            generation.steering,
            len(prompt),
            before=self._steer,
            logits=generation.wanted_logprobs is not None,
            prompt_logits=ask.prompt_logprobs is not None,
        ):
            seed(ask, generation.draw)
            self._whole.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=[penalties] if penalties.needed else [],
                streamer=answer,
                stopping_criteria=[answer],
            )
            if not generation.over:  # its client left
                self._end(generation, "abort", computed=self._watch.position)

    def accepted(
        self, generation: Generation, token_id: int, reason: str | None, stop: int | None
    ) -> None:
        """A token that stands."""
        self._log.sampled([wire.Sampled(generation.internal_id, [token_id], reason, stop)])
        if reason is not None:
            generation.over = True
            self._commands.ended([generation.internal_id])

    def stopped(self, generation: Generation, by: str | None) -> None:
        """Its text holds a stop string, or (`by`) a rule was met."""
        if by is None:
            self._end(generation, "abort", computed=self._watch.position)
        else:
            self._end(generation, "stop", stop=by)

    def token_logprobs(self, generation: Generation, token_id: int) -> tuple[Ranked, ...]:
        """Of the token that was just sampled."""
        logits = self._watch.logits
        if logits is None:
            return ()
        if generation.ask.prompt_logprobs is not None and not generation.prompt_logprobs:
            rest = zip(logits[:-1], generation.prompt_ids[1:], strict=True)
            most = generation.ask.prompt_logprobs
            generation.prompt_logprobs = [ranked(row, token, most) for row, token in rest]
        if generation.wanted_logprobs is None:
            return ()
        return (ranked(logits[-1], token_id, generation.wanted_logprobs),)

    def finish_of(
        self, generation: Generation, token_id: int, count: int
    ) -> tuple[str | None, int | None]:
        """Finish and stop reason of the token that is the `count`-th; as vLLM's `check_stop`."""
        ask = generation.ask
        if count >= ask.min_tokens:
            if token_id == self.tokenizer.eos_token_id and not ask.ignore_eos:
                return "stop", None
            if token_id in (ask.stop_token_ids or ()):
                return "stop", token_id
            if token_id in self._eos and not ask.ignore_eos:
                return "stop", token_id
        return ("length", None) if count >= generation.max_tokens else (None, None)

    def _end(
        self,
        generation: Generation,
        reason: str,
        *,
        stop: str | None = None,
        computed: int | None = None,
    ) -> None:
        generation.over = True
        self._log.sampled(
            [wire.Sampled(generation.internal_id, [], reason, stop, computed_tokens=computed)]
        )
        self._commands.ended([generation.internal_id])

    def _failed(self, generation: Generation, error: Exception) -> None:
        if is_out_of_memory(error):
            status = 503
            why = (
                f"the {self._whole.device.type} device ran out of memory on a prompt of"
                f" {len(generation.prompt_ids)} tokens; shorten it, or serve with a smaller"
                " --max-model-len or --dtype."
            )
            logger.warning("neuroscope: %s", why)
        else:
            status, why = (
                500,
                f"the model failed on it ({error!r}); the server's log has the trace.",
            )
            logger.error("neuroscope: a request failed", exc_info=error)
        if not generation.over:
            self._end(generation, "error", computed=0)
        generation.tell(Piece(generation.choice, error=(status, why)))
        # Else the trace would hold on to what did not fit.
        error.__traceback__ = None
        free_memory(self._whole.device)

    def _steer(self) -> None:
        """Changes that came meanwhile, before a forward pass."""
        for change in self._commands.take():
            generation = self._by_name(change.internal_id)
            if generation is None or generation.over:
                self._commands.ended([change.internal_id])
                continue
            self._log.steering_changed(self._changed(change, generation))

    def _changed(self, change: Change, generation: Generation) -> wire.SteeringChanged:
        generation.steering = change.steering
        position = 0
        if generation is self._running:
            position = self._watch.position
            steering = change.steering or Steering(slots=[])
            self._watch.steerer.begin(generation.internal_id, steering, len(generation.prompt_ids))
        return wire.SteeringChanged(
            change.command,
            change.internal_id,
            position=position,
            salt=uuid.uuid4().hex.encode(),
            steering=change.steering.describe() if change.steering else None,
        )

    def _by_name(self, internal_id: str) -> Generation | None:
        with self._lock:
            known = [self._running, *self._waiting]
        return next((one for one in known if one and one.internal_id == internal_id), None)


class _Answer(StoppingCriteria):
    """`generate`'s streamer and its stopping criterion in one: what it says of each token."""

    def __init__(self, generation: Generation, generator: Generator) -> None:
        ask, rust = generation.ask, generator.tokenizer.backend_tokenizer
        self._generation, self._generator = generation, generator
        stream = TextStream(
            rust,
            generation.prompt_ids,
            ask.skip_special_tokens,
            ask.spaces_between_special_tokens,
        )
        self._text = OutputText(
            stream,
            stop=ask.stops,
            include_stop_str_in_output=ask.include_stop_str_in_output,
            min_tokens=ask.min_tokens,
        )
        self._count = -1  # the first call is with the prompt

    def put(self, value: Tensor) -> None:
        self._count += 1
        generation = self._generation
        if self._count == 0 or generation.over:
            return
        token_id = int(value)
        logprobs = self._generator.token_logprobs(generation, token_id)
        reason, stop = self._generator.finish_of(generation, token_id, self._count)
        released = self._text.push([token_id], reason, stop)
        self._generator.accepted(generation, token_id, reason, stop)
        text, stopped_by = "".join(released.texts), self._text.stopped_by
        rule = generation.stopped_by_rule
        if stopped_by is not None or (rule is not None and reason is None):
            text += "".join(self._text.push([], "stop", "").texts)
        if stopped_by is not None:
            if reason is None:
                self._generator.stopped(generation, None)
            reason, stop = "stop", stopped_by
        elif rule is not None and reason is None:
            reason, stop = "stop", f"neuroscope: {rule}"
            self._generator.stopped(generation, stop)
        generation.tell(Piece(generation.choice, text, (token_id,), logprobs, reason, stop))

    def end(self) -> None:
        pass

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        over = self._generation.over or self._generation.cancelled.is_set()
        return torch.full((len(input_ids),), over, device=input_ids.device, dtype=torch.bool)
