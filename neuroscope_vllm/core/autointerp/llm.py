"""Asks a language model many questions, each of which ends in one answer. Torch-free.

Bounded in how many run at once and in what they cost; what fails is tried again. Every question
whose turn comes gets an answer, in the order in which they arrive, unless the run ends early: then
those that are left can be asked by another.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Literal, NoReturn

import msgspec

from neuroscope_vllm.core.autointerp.answers import json_object, misfit
from neuroscope_vllm.core.autointerp.limits import Budget, Concurrency
from neuroscope_vllm.core.autointerp.prices import Price, worst_case
from neuroscope_vllm.core.autointerp.providers import (
    OPENROUTER,
    Provider,
    Refused,
    TryLater,
    open_provider,
)
from neuroscope_vllm.core.autointerp.questions import Answer, Question, with_room
from neuroscope_vllm.core.autointerp.replies import Reply
from neuroscope_vllm.core.errors import ConfigError

logger = logging.getLogger(__name__)

FORMS = ((True, True), (True, False), (False, True), (False, False))
"""What is tried in turn until the server takes it: (schema, temperature)."""
ASKED_AGAIN = 2
"""How often a question is asked again whose answer can not be used."""
TRIES = 8
"""How often a request is sent that the server could not serve."""
AGAIN_TEMPERATURE = 0.7
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
PATIENCE_S = 300.0
"""A server that wants a longer rest ends the run."""
FAILURES_IN_A_ROW = 25
"""So many say that the next would fail too."""


class LLM(msgspec.Struct, frozen=True, kw_only=True):
    """A language model, and how to ask it. Keys are read from the environment, see `providers`.

    Attributes:
        provider: "openai": any server of OpenAI's API; "anthropic": theirs.
        base_url: With the version, as in https://openrouter.ai/api/v1.
        model: As the server knows it.
        concurrency: Requests at once, at most.
        timeout: Seconds for one answer.
        price: None if it is not known.
        max_cost: US dollars that a run never passes.
        thought_tokens: Room for a model's thoughts, besides a question's `max_tokens`.
    """

    model: str
    provider: Literal["openai", "anthropic"] = "openai"
    base_url: str = OPENROUTER
    concurrency: int = 8
    timeout: float = 120.0
    price: Price | None = None
    max_cost: float | None = None
    thought_tokens: int = 0


class Spent(msgspec.Struct, kw_only=True):
    """What a run came to, also while it lasts.

    Attributes:
        answered, failed: Questions.
        prompt_tokens, completion_tokens: As the server counted them.
        cost: US dollars; None if the price is not known.
        lost: What requests that broke off may have cost besides, at most.
        requests: Sent, those that failed included.
        concurrency, least_concurrency: Requests at once, now and at the fewest.
        stopped: Why the run ended before its questions did, as a sentence.
    """

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    lost: float = 0.0
    requests: int = 0
    concurrency: int = 0
    least_concurrency: int = 0
    stopped: str | None = None


def check(llm: LLM) -> LLM:
    """The same, if its bound can be kept. Raises ConfigError."""
    if llm.max_cost is not None and not 0 <= llm.max_cost < math.inf:
        raise ConfigError(f"--max-cost {llm.max_cost} is no amount; give one in US dollars.")
    if llm.max_cost is not None and llm.price is None:
        raise ConfigError(
            f"--max-cost {llm.max_cost:g} can not be kept: the price of {llm.model} is not known; "
            f"give --price-in and --price-out (US dollars for a million tokens)."
        )
    return llm


async def ask_all(
    llm: LLM,
    questions: Iterable[Question],
    *,
    on_answer: Callable[[Answer], None],
    complaint: Callable[[dict[str, Any]], str | None] = lambda content: None,
    spent: Spent | None = None,
) -> Spent:
    """Ask all questions, which are taken one by one as there is room.

    Args:
        on_answer: Called once for each question that was settled, in the event loop's thread, as
            soon as it is. What it raises ends the run.
        complaint: What is wrong with an answer that fits its schema; None if nothing is.
        spent: Kept up to date meanwhile; for progress, and for a run that is interrupted.

    Raises:
        ConfigError: There is no client, key or, for `max_cost`, price (`check`).
    """
    check(llm)
    async with AsyncExitStack() as closing:
        provider = open_provider(
            llm.provider, llm.base_url, llm.model, llm.timeout, llm.price, closing
        )
        run = _Run(
            llm,
            provider,
            with_room(questions, llm.thought_tokens),
            on_answer,
            complaint,
            spent or Spent(),
        )
        workers = [asyncio.create_task(run.work()) for _ in range(llm.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return run.spent


class _Ended(Exception):
    """The run is at its end: no request is to be sent any more."""


class _Run:
    """The state that the workers of a run share."""

    def __init__(
        self,
        llm: LLM,
        provider: Provider,
        questions: Iterator[Question],
        on_answer: Callable[[Answer], None],
        complaint: Callable[[dict[str, Any]], str | None],
        spent: Spent,
    ) -> None:
        self.llm, self.provider, self.questions = llm, provider, questions
        self.on_answer, self.complaint, self.spent = on_answer, complaint, spent
        self.slots, self.budget = Concurrency(llm.concurrency), Budget(llm.max_cost)
        self.form: tuple[bool, bool] | None = None  # that the server has taken
        self.first = asyncio.Lock()
        self.in_a_row = 0
        if llm.price is not None:
            spent.cost = spent.cost or 0.0
        self._tell()

    async def work(self) -> None:
        """Ask questions until none is left, or the run ends."""
        while self.spent.stopped is None:
            question = next(self.questions, None)
            if question is None:
                return
            try:
                answer = await self._settle(question)
            except _Ended:
                return
            if answer.content is None:
                self.spent.failed += 1
                self.in_a_row += 1
            else:
                self.spent.answered += 1
                self.in_a_row = 0
            self.on_answer(answer)
            if self.in_a_row >= FAILURES_IN_A_ROW:
                self._stop(
                    f"{self.in_a_row} questions failed one after another, the last because "
                    f"{answer.failure}; mend that and give the same command again."
                )

    async def _settle(self, question: Question) -> Answer:
        """Ask until there is an answer that can be used, or none is to be had."""
        used = _Used()
        failure: str | None = None
        for again in range(1 + ASKED_AGAIN):
            # The same words again would bring the same answer, were it not for the temperature.
            temperature = AGAIN_TEMPERATURE if again else 0.0
            try:
                reply = await self._first_or_next(question, temperature, used)
            except Refused as error:
                return used.answer(question, None, f"the server said {error.status} ({error})")
            except TryLater as error:
                return used.answer(question, None, f"{error}, {TRIES} times")
            content = json_object(reply.text)
            failure = reply.problem or misfit(reply.text, content, question.schema)
            if not failure and content is not None:
                failure = self.complaint(content)
            if not failure:
                return used.answer(question, content, None)
        return used.answer(question, None, f"{failure}, {1 + ASKED_AGAIN} times")

    async def _first_or_next(self, question: Question, temperature: float, used: _Used) -> Reply:
        """One reply. The first request goes alone, to find what the server takes."""
        if self.form is None:
            async with self.first:
                if self.form is None:
                    return await self._find_form(question, temperature, used)
        try:
            return await self._send(question, temperature, self.form, used)
        except Refused as error:
            # One question among many may be too long, or be thought indecent.
            if error.status not in (400, 403, 404, 422):
                self._refused(error)
            raise

    async def _find_form(self, question: Question, temperature: float, used: _Used) -> Reply:
        refusal: Refused | None = None
        for form in FORMS:
            try:
                reply = await self._send(question, temperature, form, used)
            except Refused as error:
                refusal = refusal or error
                if error.status not in (400, 404, 422):
                    break
            except TryLater as error:
                if not self.in_a_row:  # it may be that question's fault
                    raise
                self._stop(f"{self.llm.base_url} serves nothing: {error}; try again later.")
                raise _Ended from None
            else:
                self.form = form
                if not form[0]:
                    logger.warning(
                        "%s does not take a JSON schema; %s is told in words what to answer.",
                        self.llm.base_url,
                        self.llm.model,
                    )
                return reply
        assert refusal is not None
        return self._refused(refusal)

    async def _send(
        self, question: Question, temperature: float, form: tuple[bool, bool], used: _Used
    ) -> Reply:
        """Send a question until the server serves it.

        Raises:
            Refused: It will not. TryLater: It did not, for too long.
        """
        schema, takes_temperature = form
        ask = functools.partial(
            self.provider.ask,
            question,
            temperature=temperature if takes_temperature else None,
            schema=schema,
        )
        for tried in range(1, TRIES + 1):
            wait = min(FIRST_WAIT_S * 2 ** (tried - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            async with self.slots.slot() as began:
                try:
                    reply = await self._paid(ask, question, used)
                except TryLater as error:
                    if error.wait is not None:
                        wait = error.wait + 0.2 * wait
                    if error.is_too_many:
                        self.slots.too_many(began, wait)
                        self._tell()
                    if wait > PATIENCE_S:
                        self._stop(f"{error}, and wants to rest for {wait:,.0f} s; try again then.")
                        raise _Ended from None
                    if tried == TRIES:
                        raise
                else:
                    self.slots.went_well()
                    self._tell()
                    return reply
            await self.slots.rest(wait)
        raise AssertionError("unreachable")

    async def _paid(
        self, ask: Callable[[], Awaitable[Reply]], question: Question, used: _Used
    ) -> Reply:
        """One request, with its worst case set aside meanwhile."""
        price = self.llm.price
        worst = worst_case(question, price) if price is not None else 0.0
        if not await self.budget.reserve(worst):
            self._stop(
                f"the next request could pass --max-cost {self.budget.most:g}: "
                f"{self.budget.spent:.4f} US dollars are spent"
                + (f" and {self.budget.lost:.4f} may be." if self.budget.lost else ".")
            )
            raise _Ended
        if self.spent.stopped is not None:
            self.budget.settle(worst)
            raise _Ended
        spent, lost = 0.0, worst  # unless it turns out otherwise
        self.spent.requests += 1
        try:
            reply = await ask()
            spent, lost = self._bill(reply, worst)
            used.add(reply, spent if reply.cost is not None or price is not None else None)
            self.spent.prompt_tokens += reply.prompt_tokens
            self.spent.completion_tokens += reply.completion_tokens
            return reply
        except TryLater as error:
            lost = worst if error.may_be_billed else 0.0
            raise
        except Refused:
            lost = 0.0
            raise
        finally:
            self.budget.settle(worst, spent=spent, lost=lost)
            self._tell()

    def _bill(self, reply: Reply, worst: float) -> tuple[float, float]:
        """What a reply cost, and what it may have cost besides."""
        if reply.cost is not None:
            self.spent.cost = self.spent.cost or 0.0
            return reply.cost, 0.0
        if self.llm.price is None:
            return 0.0, 0.0
        if not reply.prompt_tokens:  # not counted
            return 0.0, worst
        return self.llm.price.of(reply.prompt_tokens, reply.completion_tokens), 0.0

    def _refused(self, error: Refused) -> NoReturn:
        advice = {
            401: "check the key",
            402: "the account has no credit left",
            403: "the key may not do that",
            404: f"check --base-url and --model ({self.llm.model})",
        }.get(error.status, f"check --model ({self.llm.model})")
        self._stop(f"{self.llm.base_url} said {error.status} ({error}); {advice}.")
        raise _Ended

    def _stop(self, why: str) -> None:
        self.spent.stopped = self.spent.stopped or why
        self.slots.close()

    def _tell(self) -> None:
        """Keep what others see up to date."""
        if self.spent.cost is not None:
            self.spent.cost = self.budget.spent
        self.spent.lost = self.budget.lost
        self.spent.concurrency, self.spent.least_concurrency = self.slots.limit, self.slots.least


class _Used:
    """What one question has used up, over all its requests."""

    def __init__(self) -> None:
        self.prompt_tokens = self.completion_tokens = 0
        self.cost: float | None = None
        self.model: str | None = None

    def add(self, reply: Reply, cost: float | None) -> None:
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.model = reply.model or self.model
        if cost is not None:
            self.cost = (self.cost or 0.0) + cost

    def answer(
        self, question: Question, content: dict[str, Any] | None, failure: str | None
    ) -> Answer:
        return Answer(
            key=question.key,
            content=content,
            failure=failure,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cost=self.cost,
            model=self.model,
        )
