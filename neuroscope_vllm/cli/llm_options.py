"""Options of the commands that ask a language model, and how what it costs is shown."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

if TYPE_CHECKING:
    from neuroscope_vllm.core.autointerp.llm import LLM, Spent
    from neuroscope_vllm.core.autointerp.prices import Price
    from neuroscope_vllm.core.examples import ExampleStore

DEFAULT_MODEL = "deepseek/deepseek-v3.2"
QUICKLY_READ = 2**30
"""Bytes of weights, of the disk or of the memory."""

_USD = click.FloatRange(min=0, max=1e9)
_OPTIONS = [
    click.option("--model", help=f"Model to ask ({DEFAULT_MODEL} of OpenRouter)."),
    click.option("--base-url", help="A server of OpenAI's API, as in http://127.0.0.1:8080/v1."),
    click.option(
        "--provider",
        type=click.Choice(["openai", "anthropic"]),
        default="openai",
        show_default=True,
        help="What the server speaks.",
    ),
    click.option("--concurrency", default=8, show_default=True, type=click.IntRange(1, 1000),
                 help="Requests at once, at most."),
    click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(min=0.1),
                 help="Seconds for one answer."),
    click.option("--thought-tokens", default=0, show_default=True, type=click.IntRange(0),
                 help="Room for thoughts, of a model that counts them to its answer."),
    click.option("--price-in", type=_USD, help="US dollars for a million tokens of a question."),
    click.option("--price-out", type=_USD, help="US dollars for a million tokens of an answer."),
    click.option("--max-cost", type=_USD, help="US dollars that this run never passes."),
]  # fmt: skip
KEYS_HELP = (
    "Keys come from the environment: OPENROUTER_API_KEY, OPENAI_API_KEY or ANTHROPIC_API_KEY for "
    "these; LLM_API_KEY for any other server that wants one."
)


def llm_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that name a language model, as `llm_options` for `open_llm`."""

    @functools.wraps(function)
    def wrapped(**given: Any) -> Any:
        names = ("model", "base_url", "provider", "concurrency", "timeout", "thought_tokens")
        prices = ("price_in", "price_out", "max_cost")
        chosen = {name: given.pop(name) for name in (*names, *prices)}
        return function(llm_options=chosen, **given)

    command: Callable[..., Any] = wrapped
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def open_llm(
    *,
    model: str | None,
    base_url: str | None,
    provider: str,
    concurrency: int,
    timeout: float,
    thought_tokens: int,
    max_cost: float | None,
    **prices: float | None,
) -> LLM:
    """The language model that was asked for; its server is asked for what was not given.

    Raises:
        ConfigError: It is not known which, or --max-cost can not be kept.
    """
    from neuroscope_vllm.core.autointerp.llm import LLM, check
    from neuroscope_vllm.core.autointerp.lookup import look_up
    from neuroscope_vllm.core.autointerp.providers import ANTHROPIC, OPENROUTER

    if provider == "anthropic":
        base_url = (base_url or ANTHROPIC).rstrip("/").removesuffix("/v1")
    elif base_url is None:
        base_url, model = OPENROUTER, model or DEFAULT_MODEL
    if not _is_address(base_url):
        raise click.UsageError(
            f"--base-url {base_url} is no address as in http://127.0.0.1:8080/v1."
        )
    if urlsplit(base_url).password:
        raise click.UsageError(f"--base-url holds a password, which would be shown. {KEYS_HELP}")
    if math.isnan(timeout):
        raise click.UsageError("--timeout nan is no number of seconds.")
    llm = LLM(
        model=model or "",
        provider="anthropic" if provider == "anthropic" else "openai",
        base_url=base_url,
        concurrency=concurrency,
        timeout=timeout,
        price=given_price(prices),
        max_cost=max_cost,
        thought_tokens=thought_tokens,
    )
    return check(asyncio.run(look_up(llm)))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def given_price(llm_options: dict[str, Any]) -> Price | None:
    """What the user says that tokens cost."""
    from neuroscope_vllm.core.autointerp.prices import Price

    prompt, completion = llm_options["price_in"], llm_options["price_out"]
    if (prompt is None) != (completion is None):
        raise click.UsageError("--price-in and --price-out go together.")
    return None if prompt is None else Price(prompt / 1e6, completion / 1e6)


def shown_cost(spent: Spent) -> str:
    """What a run has cost so far, for a progress bar or a summary."""
    tokens = f"{spent.prompt_tokens + spent.completion_tokens:,} tokens"
    if spent.cost is None:
        return f"{tokens}, price unknown"
    lost = f" + at most ${spent.lost:.4f} of requests that broke off" if spent.lost else ""
    return f"{tokens}, ${spent.cost:.4f}{lost}"


def feature_list(given: str | None) -> list[int] | None:
    """Features named as in 1,2,3, in that order; None if none are."""
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", given):
        raise click.UsageError(f"--features {given} is no list as in 1,2,3.")
    return list(dict.fromkeys(int(one) for one in given.split(",")))


def open_examples(source: str) -> ExampleStore:
    """What `collect` kept for an SAE.

    Raises:
        ConfigError: There is nothing, or too little, or it is of other weights than the SAE has
            now.
    """
    from neuroscope_vllm.core.errors import ConfigError
    from neuroscope_vllm.core.examples import ExampleStore, find_examples

    folder = find_examples(source) or find_examples(source, "rms")
    if folder is None:
        raise ConfigError(
            f"there are no examples of {source} to show; gather them with `neuroscope collect`."
        )
    store = ExampleStore(folder)
    if not store.contexts:
        raise ConfigError(
            f"the examples that ship with {source} are a few of each feature, for its card; gather"
            " more with `neuroscope collect`."
        )
    if _digest(source) not in (None, store.collection.sae_digest):
        raise ConfigError(
            f"examples {folder} were collected with other weights than SAE {source} has now; "
            f"gather them again with `neuroscope collect`."
        )
    return store


def _digest(source: str) -> str | None:
    """Of an SAE's weights, where they are on this disk and quickly read."""
    from neuroscope_vllm.core.artefacts import sae_folder

    files = [] if source.startswith("hf://") else sae_folder(source).rglob("*")
    if not 0 < sum(path.stat().st_size for path in files if path.is_file()) <= QUICKLY_READ:
        return None
    from neuroscope_vllm.core.errors import SAEError
    from neuroscope_vllm.core.sae import load_sae

    try:
        return load_sae(source).digest
    except SAEError:  # labels need none
        return None


@contextlib.contextmanager
def progress(features: int) -> Iterator[Callable[[int, int, Spent], None]]:
    """A bar with the cost so far.

    Yields:
        What to call with the features that are settled, those there are, and what was spent.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    from neuroscope_vllm.cli.supervise import console

    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[cost]}"), Left(), console=console) as bar:
        task = bar.add_task("", total=features, cost="")

        def report(settled: int, total: int, spent: Spent) -> None:
            bar.update(task, completed=settled, total=total, cost=shown_cost(spent))

        yield report
