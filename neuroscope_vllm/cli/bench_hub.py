"""The measurement behind `neuroscope bench hub`: one hub, its engine and its readers, all real
processes, and the books that must balance."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import numpy as np
from rich.table import Table

from neuroscope_vllm.cli import bench_hub_feed, bench_hub_readers
from neuroscope_vllm.cli.bench_report import Report
from neuroscope_vllm.cli.bench_shapes import small_tokenizer
from neuroscope_vllm.cli.machine import cores
from neuroscope_vllm.cli.supervise import console, end_what_we_start
from neuroscope_vllm.core import launch
from neuroscope_vllm.core.config import Settings

HUB, PLAIN = "hub", "sse-starlette"
READERS_PER_PROCESS = 500
SPARE_FILES = 100
START_TIMEOUT_S = 30
READERS_TIMEOUT_S = 300
SAMPLE_S = 1.0
QUANTILES = (50, 99)


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    events_per_second: float
    readers: int
    seconds: float
    follow: str
    memory_mb: int
    ring_mb: int | None


@dataclass(frozen=True)
class Receiver:
    """The server under load."""

    pid: int
    port: int
    endpoint: str
    kind: str
    """As `bench_hub_feed.Feed` says."""

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def measure(load: Load, against: str | None) -> Report:
    """{"hub": figures, "sse-starlette": figures where asked for, …the load}.

    Raises click.ClickException where this machine does not allow so many readers, or a process
    ends.
    """
    if not Path("/proc/self/statm").exists():
        raise click.ClickException(
            "bench hub reads the hub's memory and time from /proc, which this system has not; run"
            " it on Linux."
        )
    _allow_files(load.readers + SPARE_FILES)
    end_what_we_start()
    report: Report = {**msgspec.to_builtins(load), "against": against}
    with tempfile.TemporaryDirectory(prefix="neuroscope-bench-") as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        small_tokenizer().save(str(tokenizer))
        with _hub(load, tokenizer) as receiver:
            report[HUB] = _run(receiver, load, tokenizer)
        if against:
            with _broadcaster(Path(folder)) as receiver:
                report[PLAIN] = _run(receiver, load, tokenizer)
    return report


def balanced(report: Report) -> bool:
    return report[HUB]["books"]["balance"]


def _allow_files(files: int) -> None:
    """Each reader is a connection at both ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < files:
        raise click.ClickException(
            f"so many readers need {files} open files a process, and only {hard} are allowed here;"
            " raise that (`ulimit -n`), or give fewer --readers."
        )
    if soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


@contextlib.contextmanager
def _hub(load: Load, tokenizer: Path) -> Iterator[Receiver]:
    """The side process, started as vLLM's front process does."""
    listener = launch.listen("127.0.0.1", 0)
    directory = launch.runtime_directory()
    side = launch.launch(
        Settings(memory_mb=load.memory_mb, ring_mb=load.ring_mb),
        model="fake",
        directory=directory,
        listener=listener,
        tokenizer_file=tokenizer,
        upstream=None,
        labels={},
    )
    try:
        if not launch.wait_for_socket(directory, START_TIMEOUT_S) or side.pid is None:
            raise click.ClickException("the hub did not start; its last lines are above.")
        endpoint = launch.endpoint_of(directory)
        yield Receiver(side.pid, listener.getsockname()[1], endpoint, HUB)
    finally:
        side.stop()


@contextlib.contextmanager
def _broadcaster(folder: Path) -> Iterator[Receiver]:
    listener = launch.listen("127.0.0.1", 0)
    port, endpoint = listener.getsockname()[1], f"ipc://{folder}/plain.sock"
    fd = listener.fileno()
    module = "neuroscope_vllm.cli.bench_hub_plain"
    with _process([sys.executable, "-m", module, str(fd), endpoint], pass_fds=(fd,)) as plain:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (folder / "plain.sock").exists():
            if plain.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException("sse-starlette's server did not start.")
            time.sleep(0.1)
        yield Receiver(plain.pid, port, endpoint, "frames")


@contextlib.contextmanager
def _process(words: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(words, text=True, start_new_session=True, **options)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _run(receiver: Receiver, load: Load, tokenizer: Path) -> dict[str, Any]:
    """Figures of one server under the load."""
    origin = time.monotonic()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with contextlib.ExitStack() as running:
        lags = [tokenizer.with_name(f"lags-{i}.npy") for i in range(_crowds(load.readers))]
        crowds = []
        for i, file in enumerate(lags):
            first, end = (load.readers * at // len(lags) for at in (i, i + 1))
            asked = bench_hub_readers.Readers(
                receiver.port, first, end - first, load.follow, origin, str(file)
            )
            crowds.append(running.enter_context(_process(bench_hub_readers.words(asked), **pipes)))
        with console.status(f"connecting {load.readers} readers"):
            for crowd in crowds:
                _line(crowd)
        feed = bench_hub_feed.Feed(
            kind=receiver.kind,
            endpoint=receiver.endpoint,
            base=receiver.base,
            tokenizer_file=str(tokenizer),
            slots=load.readers,
            events_per_second=load.events_per_second,
            seconds=load.seconds,
            origin=origin,
        )
        with console.status(f"{receiver.kind}: {load.seconds:.0f} s of load"):
            meter = running.enter_context(_metering(receiver.pid))
            engine = running.enter_context(
                _process(bench_hub_feed.words(feed), stdout=subprocess.PIPE)
            )
            fed = _line(engine)
            samples = list(meter)
            expected = fed["events"]
            if load.follow == "all":
                # The hub's own: gaps of rows that it, at its ceiling, could not keep.
                gaps = _settled(receiver)["gaps_dropped"] if receiver.kind == HUB else 0
                expected = [sum(expected) + gaps] * load.readers
            for crowd in crowds:
                assert crowd.stdin is not None
                crowd.stdin.write(json.dumps(expected) + "\n")
                crowd.stdin.flush()
            heard = [_line(crowd) for crowd in crowds]
        counters = _counters(receiver) if receiver.kind == HUB else {}
        if refused := counters.get("requests_refused"):
            raise click.ClickException(
                f"the hub had no room to follow {refused} of the requests, so no books can be kept;"
                " give more --memory-mb, or fewer --readers."
            )
        delays = np.concatenate([np.load(file) for file in lags])
    return _figures(fed, samples, delays) | {"books": _books(expected, heard, counters)}


def _crowds(readers: int) -> int:
    return max(1, min(-(-readers // READERS_PER_PROCESS), cores()))


def _line(child: subprocess.Popen[str]) -> Any:
    """The next JSON that the child prints. Raises click.ClickException if it ended instead."""
    assert child.stdout is not None
    if not (line := child.stdout.readline()):
        raise click.ClickException("a process of the bench ended; its last lines are above.")
    return json.loads(line)


def _counters(receiver: Receiver) -> dict[str, int]:
    answer = httpx.get(f"{receiver.base}/v1/features/describe", timeout=60).raise_for_status()
    return answer.json()["counters"]


def _settled(receiver: Receiver) -> Counter[str]:
    """The hub's counters once all that it follows has ended, or will not."""
    deadline = time.monotonic() + READERS_TIMEOUT_S
    while True:
        found = Counter(_counters(receiver))
        if found["requests_done"] >= found["requests"] or time.monotonic() > deadline:
            return found
        time.sleep(SAMPLE_S / 4)


@contextlib.contextmanager
def _metering(pid: int) -> Iterator[list[dict[str, float]]]:
    """{"at", "cpu_s", "rss_mb"} of a process, one a second, until left."""
    samples = [_sample(pid)]
    leaving = threading.Event()

    def go_on() -> None:
        while not leaving.wait(SAMPLE_S):
            with contextlib.suppress(OSError):
                samples.append(_sample(pid))

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        leaving.set()
        thread.join()


def _sample(pid: int) -> dict[str, float]:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    # Fields from the third on: the second is a name in brackets, and may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return {
        "at": time.monotonic(),
        "cpu_s": ticks / os.sysconf("SC_CLK_TCK"),
        "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
    }


def _figures(fed: dict[str, Any], samples: list[dict[str, float]], delays: Any) -> dict[str, Any]:
    first, last = samples[0], samples[-1]
    elapsed = max(last["at"] - first["at"], 1e-9)
    resident = [one["rss_mb"] for one in samples]
    return {
        "events_per_second": fed["events_per_second"],
        "engine_waited_share": fed["waited_share"],
        "cpu_share": round((last["cpu_s"] - first["cpu_s"]) / elapsed, 3),
        "rss_mb": {
            "before": resident[0],
            "median": float(np.median(resident)),
            "max": max(resident),
        },
        "rss_over_time": [(round(s["at"] - first["at"], 1), s["rss_mb"]) for s in samples],
        "lag_ms": {f"p{q}": round(1e3 * float(np.percentile(delays, q)), 1) for q in QUANTILES}
        if len(delays)
        else {},
    }


def _books(
    expected: list[int],
    heard: list[dict[str, Any]],
    counters: dict[str, int],
) -> dict[str, Any]:
    """Of each reader: events published = events received + events that its gaps tell of; of all:
    what gaps told = what the hub counted."""
    received = [count for one in heard for count in one["received"]]
    lost = [sum(of.values()) for one in heard for of in one["lost"]]
    reasons = sum((Counter(of) for one in heard for of in one["lost"]), Counter[str]())
    off = [p - r - g for p, r, g in zip(expected, received, lost, strict=True)]
    counted = {name: counters.get(f"events_{name}", 0) for name in ("slow_reader", "evicted")}
    told = {name: reasons.get(name, 0) for name in counted}
    return {
        "published": sum(expected),
        "received": sum(received),
        "received_by_a_reader": {"min": min(received), "max": max(received)},
        "in_gaps": told,
        "counted_by_the_hub": counted,
        "unaccounted": sum(map(abs, off)),
        "readers_off": sum(one != 0 for one in off),
        "failures": sorted({failure for one in heard for failure in one["failures"]}),
        "balance": not any(off) and told == counted,
    }


def table(report: Report) -> None:
    names = [name for name in (HUB, PLAIN) if name in report]
    watched = "all requests" if report["follow"] == "all" else "a request of its own"
    grid = Table(
        title=f"{report['readers']} readers, each of {watched}; {report['events_per_second']:,.0f}"
        f" token events a second asked for, {report['seconds']:.0f} s"
    )
    grid.add_column("")
    for name in names:
        grid.add_column(name, justify="right")
    for heading, show in _LINES.items():
        grid.add_row(heading, *(show(report[name]) for name in names))
    console.print(grid)
    console.print(
        f"The ceiling of the hub's kept events is {report['memory_mb']} MiB, beside what the"
        " process takes itself. Lag: from the engine's thread to the reader, of the oldest token"
        " in each write. The engine waits for a receiver that is a second behind."
    )
    books = report[HUB]["books"]
    if not books["balance"]:
        console.print(
            f"[red]The hub's books do not balance:[/] {books['readers_off']} readers miss"
            f" {books['unaccounted']} events that no gap told of; gaps told of {books['in_gaps']},"
            f" the hub counted {books['counted_by_the_hub']}."
        )


_LINES = {
    "token events in, a second": lambda one: f"{one['events_per_second']:,.0f}",
    "time that the engine waited for it": lambda one: f"{one['engine_waited_share']:.0%}",
    "CPU, cores": lambda one: f"{one['cpu_share']:.2f}",
    "memory before, MiB": lambda one: f"{one['rss_mb']['before']:.0f}",
    "memory median, MiB": lambda one: f"{one['rss_mb']['median']:.0f}",
    "memory most, MiB": lambda one: f"{one['rss_mb']['max']:.0f}",
    "lag p50 / p99, ms": lambda one: " / ".join(f"{v:,.0f}" for v in one["lag_ms"].values()),
    "events for all readers": lambda one: f"{one['books']['published']:,}",
    "of them received": lambda one: f"{one['books']['received']:,}",
    "lost, and told in a gap": lambda one: f"{sum(one['books']['in_gaps'].values()):,}",
    "lost without a word": lambda one: f"{one['books']['unaccounted']:,}",
}


def draw(report: Report, axes: Any) -> None:
    """Resident memory over time."""
    for name in (HUB, PLAIN):
        if name in report:
            times, resident = zip(*report[name]["rss_over_time"], strict=True)
            axes.plot(times, resident, label=name)
    ceiling = report[HUB]["rss_mb"]["before"] + report["memory_mb"]
    axes.axhline(ceiling, linestyle=":", color="#666666", label="before + ceiling of kept events")
    axes.set(xlabel="s", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend()
