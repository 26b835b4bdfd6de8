"""The measurement behind `neuroscope bench corpus`."""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress
from rich.table import Table

from neuroscope_vllm.cli.supervise import console

if TYPE_CHECKING:
    from neuroscope_vllm.core.config import Settings
    from neuroscope_vllm.core.corpus import Corpus

OURS = "collect"
LOOPS = ("transformers + SAELens, float32", "transformers + SAELens, bfloat16")
CHUNK = 50


def compare(
    model: str,
    settings: Settings,
    corpus: Corpus,
    rounds: int,
    vllm_flags: tuple[str, ...],
) -> dict[str, Any]:
    """Tokens per second of `collect` and of what it is measured against, in turn.

    Each runs in a process of its own that has the machine to itself while it runs. A round gives
    all the same samples, in alternating order; the figures are medians of the rounds' ratios. Only
    that loop takes part which is faster on this machine.
    """
    from neuroscope_vllm.core.sae.observed import observed

    (layer,) = observed(settings)
    source = settings.sae[0]
    runners = {
        OURS: (_collect, (model, settings, corpus.max_tokens, vllm_flags)),
        "vLLM, full depth": (_prefill, (model, corpus.max_tokens, vllm_flags)),
        **{name: (_loop, (model, source, layer, name.rpartition(" ")[2])) for name in LOOPS},
    }
    chunks = _chunks(model, corpus)
    if len(chunks) < 2:
        raise click.ClickException("the corpus is too small; at least 100 samples are needed.")
    with Progress(console=console) as progress:
        steps = progress.add_task("starting", total=len(runners) + rounds * (len(runners) - 1))
        children = {}
        try:
            warm_up: dict[str, float] = {}
            for name, (build, arguments) in runners.items():
                children[name] = _Child(build, arguments)
                warm_up[name] = children[name].run(chunks[0])  # compiles and allocates, too
                progress.update(steps, advance=1, description=name)
            slower = max(LOOPS, key=lambda name: warm_up[name])
            children.pop(slower).stop()
            speeds: dict[str, list[float]] = {name: [] for name in children}
            for number in range(rounds):
                chunk = chunks[1 + number % (len(chunks) - 1)]
                tokens = sum(map(len, chunk))
                for name in list(children)[:: 1 if number % 2 else -1]:
                    speeds[name].append(tokens / children[name].run(chunk))
                    progress.update(steps, advance=1, description=name)
            memory = {name: child.peak_memory() for name, child in children.items()}
        finally:
            for child in children.values():
                child.stop()
    rows = [
        {
            "name": name,
            "tokens_per_second": statistics.median(found),
            "collect_is_times": statistics.median(
                ours / theirs for ours, theirs in zip(speeds[OURS], found, strict=True)
            ),
            "peak_memory_mib": memory[name] / 2**20,
        }
        for name, found in speeds.items()
    ]
    return {"rounds": rounds, "tokens_a_round": sum(map(len, chunks[1])), "rows": rows}


def table(report: dict[str, Any]) -> None:
    from rich.console import Console

    shown = Table(title=f"one corpus, medians of {report['rounds']} rounds")
    shown.add_column("what runs it")
    for name in ("tokens/s", "collect is, times", "peak memory, MiB"):
        shown.add_column(name, justify="right")
    for row in report["rows"]:
        shown.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['collect_is_times']:.2f}",
            f"{row['peak_memory_mib']:,.0f}",
        )
    Console().print(shown)


class _Child:
    """A runner in its own process, which sleeps while others run."""

    def __init__(self, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments))
        self._process.start()
        theirs.close()
        self._hear()

    def run(self, chunk: list[list[int]]) -> float:
        """Seconds that it took."""
        self._pipe.send(chunk)
        return self._hear()

    def peak_memory(self) -> int:
        """Bytes, of the process and those that it started."""
        import psutil

        family = psutil.Process(self._process.pid)
        return sum(map(_peak, [family, *family.children(recursive=True)]))

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(20)
        self._process.kill()

    def _hear(self) -> float:
        try:
            found = self._pipe.recv()
        except EOFError:
            raise click.ClickException("a process of the measurement died.") from None
        if isinstance(found, str):
            raise click.ClickException(found)
        return found


def _serve(pipe: Connection, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from neuroscope_vllm.core.errors import NeuroscopeError

    try:
        run = build(*arguments)
        pipe.send(0.0)
        while True:
            chunk = pipe.recv()
            began = time.perf_counter()
            run(chunk)
            pipe.send(time.perf_counter() - began)
    except EOFError:
        return
    except NeuroscopeError as error:
        pipe.send(str(error))


def _collect(model: str, settings: Settings, max_tokens: int, flags: tuple[str, ...]) -> Any:
    """As `collect` runs a chunk: the pass, and what is kept of it here."""
    from neuroscope_vllm.engine.collect import Collected, Wanted, add, next_pass
    from neuroscope_vllm.engine.collect_checkpoint import Stored
    from neuroscope_vllm.engine.corpus_run import Done
    from neuroscope_vllm.engine.vllm.engine import VLLMEngine

    engine = VLLMEngine(model, settings, max_tokens, flags)
    wanted, found = Wanted(), Collected(done=Done(run="", created=""))

    def run(chunk: list[list[int]]) -> None:
        results = engine.run(next_pass(engine, wanted, found), chunk)
        add(found, Stored.of(chunk, results), wanted, Path())

    return run


def _prefill(model: str, max_tokens: int, flags: tuple[str, ...]) -> Any:
    from neuroscope_vllm.engine.vllm.prefill import Prefill

    return Prefill(model, max_tokens, flags).run


def _loop(model: str, source: str, layer: int, dtype: str) -> Any:
    from neuroscope_vllm.engine.hf.plain_loop import PlainLoop

    return PlainLoop(model, source, layer, dtype).run


def _chunks(model: str, corpus: Corpus) -> list[list[list[int]]]:
    from neuroscope_vllm.core.corpus import samples
    from neuroscope_vllm.engine.hf.loading import load_tokenizer

    found = samples(corpus, load_tokenizer(model))
    return list(iter(lambda: list(itertools.islice(found, CHUNK)), []))


def _peak(process: Any) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
