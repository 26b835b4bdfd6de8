"""What is served, and a request on its way: from its prompts to the pieces of its choices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

from neuroscope_vllm.core.access import digest
from neuroscope_vllm.core.request import KEY, RequestOptions, request_options
from neuroscope_vllm.core.steering.catalogue import Catalogue
from neuroscope_vllm.core.steering.settle import SteeringRefused, settle
from neuroscope_vllm.core.steering.settled import Steering
from neuroscope_vllm.engine.hf.serve.ask import Ask, ChatAsk, CompletionAsk, Refused
from neuroscope_vllm.engine.hf.serve.generation import Generation, Generator, Piece

QUEUE_INTERVAL_S = 1.0
"""How often who waits is told how many are before it."""
AHEAD_HEADER = "X-Queue-Ahead"


class Served:
    """What both kinds of requests are answered from."""

    def __init__(self, generator: Generator, catalogue: Catalogue, name: str) -> None:
        """`name`: the model's, as clients know it."""
        self.generator, self.catalogue, self.name = generator, catalogue, name
        # It loads nothing: there is one model, and it is loaded.
        self.manager = ModelManager(device="cpu", attn_implementation="eager")
        self.state = GenerationState()
        self.created = int(time.time())
        longest_token = max(map(len, generator.tokenizer.get_vocab()))
        self._longest_text = generator.max_model_len * longest_token

    def encode(self, text: str, ask: ChatAsk | CompletionAsk) -> list[int]:
        """Token ids. Raises Refused: No tokens of it would fit, which is seen without any."""
        longest = self._longest_text
        if len(text) > longest:
            if ask.truncate_prompt_tokens is None:
                raise Refused(
                    f"This model's maximum context length is {self.generator.max_model_len} tokens."
                    f" However, your prompt contains {len(text)} characters (more than {longest},"
                    " the upper bound of what fits). Please reduce the length of the input prompt.",
                    "input_text",
                )
            text = text[-longest:]
        return self.generator.tokenizer.encode(text, add_special_tokens=ask.add_special_tokens)

    def options(self, ask: Ask) -> RequestOptions:
        """Raises Refused: It asks for what we do not know."""
        for name in ask.vllm_xargs or ():
            if name.startswith(f"{KEY}_"):  # as vLLM's engine notes things for itself
                raise Refused(f"vllm_xargs.{name} is reserved; leave it out.", "vllm_xargs")
        try:
            return request_options(ask.vllm_xargs)
        except ValueError as error:
            raise Refused(str(error), "vllm_xargs") from None

    def steering(self, options: RequestOptions) -> Steering | None:
        """Raises Refused: It asks for what can not be done."""
        try:
            return settle(options, self.catalogue)
        except SteeringRefused as refusal:
            raise Refused(f"vllm_xargs.{KEY}.{refusal}", "vllm_xargs") from None

    def check_model(self, ask: Ask) -> None:
        if ask.model not in (None, self.name):
            raise Refused(f"The model `{ask.model}` does not exist.", "model", 404)

    def room(self, ask: ChatAsk | CompletionAsk, prompt: list[int]) -> int:
        """How many tokens it may generate. Raises Refused: They do not fit."""
        longest, length = self.generator.max_model_len, len(prompt)
        if not prompt:
            raise Refused("the prompt is empty; give at least one token.", "prompt")
        wanted = ask.limit
        if length + (wanted or 1) > longest:
            raise Refused(
                f"This model's maximum context length is {longest} tokens. However, you requested"
                f" {wanted or 1} output tokens and your prompt contains {length} input tokens."
                " Please reduce the length of the input prompt or the number of requested output"
                " tokens.",
                "input_tokens",
            )
        return longest - length if wanted is None else wanted

    def check_ids(self, ask: Ask, prompt: list[int]) -> None:
        size = self.generator.vocabulary
        for name, ids in (("prompt", prompt), ("stop_token_ids", ask.stop_token_ids or []),
                          ("logit_bias", map(int, ask.logit_bias or ()))):  # fmt: skip
            for token_id in ids:
                if not 0 <= token_id < size:
                    raise Refused(
                        f"{name} holds token id {token_id}; this model's end at {size - 1}.", name
                    )

    def decode(self, token_id: int) -> str:
        return self.generator.tokenizer.decode([token_id])


class Answering:
    """The choices of one request, from its prompts to their pieces."""

    def __init__(
        self, served: Served, ask: ChatAsk | CompletionAsk, answer_id: str, prompts: list[list[int]]
    ) -> None:
        """Raises Refused before anything runs. `prompts`: token ids."""
        self.served, self.ask, self.id = served, ask, answer_id
        self.created = int(time.time())
        longest = served.generator.max_model_len
        self.prompts = prompts = [ask.truncated(prompt, longest) for prompt in prompts]
        options = served.options(ask)
        steering = served.steering(options)
        secret = digest(options.stream_secret) if options.stream_secret is not None else None
        rooms = [served.room(ask, prompt) for prompt in prompts]
        for prompt in prompts:
            served.check_ids(ask, prompt)
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def tell(piece: Piece) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self.choices = [
            Generation(
                ask,
                request_id=answer_id,
                choice=number * ask.n + draw,
                draw=draw,
                name=answer_id if isinstance(ask, ChatAsk) else f"{answer_id}-{number}",
                prompt_ids=prompt,
                max_tokens=room,
                steering=steering,
                secret=secret,
                wanted_logprobs=ask.wanted_logprobs,
                tell=tell,
            )
            for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
            for draw in range(ask.n)
        ]
        self.ahead = len(served.generator.queue())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Whoever leaves it early takes its choices with them."""
        generator, submitted = self.served.generator, []
        try:
            for one in self.choices:
                generator.submit(one)
                submitted.append(one)
            yield
        finally:
            for one in submitted:
                if not one.over:
                    generator.cancel(one)

    async def pieces(self) -> AsyncIterator[Piece | int]:
        """Until all choices ended; an int says how many are still before the first.

        Raises Refused: A choice failed.
        """
        open_choices = {one.choice for one in self.choices}
        while open_choices:
            try:
                piece = await asyncio.wait_for(self._pieces.get(), QUEUE_INTERVAL_S)
            except TimeoutError:
                if ahead := self.served.generator.ahead(self.choices[0]):
                    yield ahead
                continue
            if piece.error is not None:
                status, message = piece.error
                raise Refused(message, None, status)
            yield piece
            if piece.finish_reason is not None:
                open_choices.discard(piece.choice)

    def usage(self, generated: int) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    def headers(self) -> dict[str, str]:
        return {AHEAD_HEADER: str(self.ahead)}
