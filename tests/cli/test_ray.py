"""Corpus passes on a real Ray cluster: the same bits as without, whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.artefacts import DATA_VARIABLE
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.corpus import Corpus
from neuroscope_vllm.core.errors import ConfigError, EngineError, NeuroscopeError, SAEError
from neuroscope_vllm.core.examples.store import SCHEMAS
from neuroscope_vllm.core.passes import CalibrationPass, FeaturePass, Rows
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.engine import ray_engines
from neuroscope_vllm.engine.calibrate import Checkpoint, calibrate
from neuroscope_vllm.engine.collect import Wanted, collect, write
from neuroscope_vllm.engine.corpus_run import CHUNK, Done
from neuroscope_vllm.engine.ray_cluster import Plan, connect, plan
from neuroscope_vllm.engine.ray_engines import RayEngines
from neuroscope_vllm.engine.spec import EngineSpec
from tests.cli.test_calibrate import kill, neuroscope
from tests.core.test_calibration import assert_equal
from tests.support import models
from tests.support.served import bin_path, environment

SAMPLES = 12 * CHUNK
MAX_TOKENS = 24
VLLM = ("--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "200")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One for all engines of this process, which find that they are connected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv(DATA_VARIABLE, str(tmp_path_factory.mktemp("data")))
        patch.delenv("RAY_ADDRESS", raising=False)
        ray, ours = connect(None)
        assert ours
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    words = " ".join(models.TRAINING_TEXT).split()
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rows = ({"text": " ".join(draw.choices(words, k=30))} for _ in range(SAMPLES))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def corpus(texts: Path) -> Corpus:
    return Corpus(source=str(texts), samples=SAMPLES, max_tokens=MAX_TOKENS)


@pytest.fixture
def quick(tiny_llama: Path, tiny_sae: Path) -> EngineSpec:
    return EngineSpec(
        model=str(tiny_llama), settings=Settings(sae=[str(tiny_sae)]), backend="transformers"
    )


def workers_of(process: psutil.Process, doing: str = "") -> list[psutil.Process]:
    """Ray's processes of workers, those that are `doing` a method of theirs."""
    found = []
    for child in process.children(recursive=True):
        try:
            if " ".join(child.cmdline()).startswith(f"ray::RayWorker{doing}"):
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return found


def words(spec: EngineSpec, corpus: Corpus, output: Path) -> tuple[object, ...]:
    return (
        "calibrate", spec.model, "--sae", spec.settings.sae[0], "--backend", spec.backend,
        "--corpus", corpus.source, "--samples", corpus.samples, "--max-tokens", corpus.max_tokens,
        "--output", output, "--json",
    )  # fmt: skip


def test_a_cluster_of_ones_own_listens_on_loopback_only(cluster: Any) -> None:
    # First of all: engines that ran on it listen where vLLM has them.
    package = str(Path(cluster.__file__).parent)
    listening = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            words = " ".join(process.cmdline())
            if words.startswith("ray::") or package in words:
                listening += [
                    connection.laddr.ip
                    for connection in process.net_connections("inet")
                    if connection.status == psutil.CONN_LISTEN
                ]
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_two_vllms_end_with_the_bits_of_one_also_if_a_worker_is_killed(
    tiny_gemma2: Path, tiny_sae: Path, corpus: Corpus, tmp_path: Path
) -> None:
    spec = EngineSpec(
        model=str(tiny_gemma2),
        settings=Settings(sae=[str(tiny_sae)]),
        max_tokens=MAX_TOKENS,
        vllm_flags=VLLM,
    )
    done = neuroscope(*words(spec, corpus, tmp_path / "one"), "--", *VLLM)
    assert done.returncode == 0, done.stderr
    one = Calibration.load(tmp_path / "one")
    killed: list[int] = []

    def kill_one(done: Checkpoint) -> None:
        if done.chunks == 3:
            victim = workers_of(psutil.Process(), ".run")[0]
            victim.kill()
            killed.append(victim.pid)

    engines = RayEngines(spec, workers=2)
    try:
        before = {worker.pid for worker in workers_of(psutil.Process())}
        assert len(before) == 2
        calibrations, _ = calibrate(engines, corpus, tmp_path / "two")
        assert_equal(calibrations[20], one)
        calibrations, whole = calibrate(engines, corpus, tmp_path / "three", on_progress=kill_one)
        assert_equal(calibrations[20], one)
        assert (whole.chunks, whole.sequences) == (SAMPLES / CHUNK, SAMPLES)
        after = {worker.pid for worker in workers_of(psutil.Process())}
        assert before - after == set(killed) != set()
        with pytest.raises(EngineError, match="vLLM failed on 1 sequences") as caught:
            engines.run(FeaturePass(), [[7] * 600])
        assert "\n" not in str(caught.value)
    finally:
        engines.close()
    assert not psutil.wait_procs(workers_of(psutil.Process()), timeout=60)[1]


def test_what_was_begun_without_ray_is_gone_on_with_on_it_whatever_dies(
    quick: EngineSpec, corpus: Corpus, tmp_path: Path
) -> None:
    """By the command, with a cluster of its own, which ends with it."""
    corpus = msgspec.structs.replace(corpus, samples=4 * CHUNK)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    in_one = neuroscope(*words(quick, corpus, whole), env={"OMP_NUM_THREADS": "1"})
    assert in_one.returncode == 0, in_one.stderr
    chunks = kill(words(quick, corpus, parts), Path(f"{parts}.checkpoint"), 0)
    assert 0 < chunks < 4
    done = run_and_kill_a_worker(*words(quick, corpus, parts), "--ray", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert_equal(Calibration.load(parts), Calibration.load(whole))
    assert json.loads(done.stdout)[0]["samples"] == 4 * CHUNK
    assert "a Ray worker died on chunk" in done.stderr


def run_and_kill_a_worker(*words: object) -> subprocess.CompletedProcess[str]:
    """The command, one of whose workers is killed at its first chunk."""
    given = [bin_path("neuroscope"), *map(str, words)]
    process = subprocess.Popen(
        given, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (running := workers_of(psutil.Process(process.pid), ".run")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    running[0].kill()
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(given, process.returncode, out, err)


def test_examples_collected_on_ray_are_those_of_one_engine(
    quick: EngineSpec, corpus: Corpus, tmp_path: Path
) -> None:
    corpus = msgspec.structs.replace(corpus, samples=4 * CHUNK)
    wanted = Wanted(before=6, after=3)

    def kill_one(done: Done) -> None:
        if done.chunks == 1 and engine is not one:
            workers_of(psutil.Process(), ".run")[0].kill()

    torch.set_num_threads(1)  # tiny layers: threads would wait for each other
    one = quick.open()
    for engine in (one, RayEngines(quick, workers=2)):
        where = tmp_path / engine.__class__.__name__
        with contextlib.closing(engine):
            found, _ = collect(
                engine, corpus, wanted, where.with_suffix(".checkpoint"), on_progress=kill_one
            )
            assert found.done.sequences == 4 * CHUNK
            write(engine, corpus, wanted, found, {20: where}, lambda ids: [str(i) for i in ids])
    for name in SCHEMAS:
        single, spread = (
            pq.read_table(tmp_path / engine / f"{name}.parquet")
            for engine in ("HFEngine", "RayEngines")
        )
        assert single.num_rows > 0
        assert spread.equals(single, check_metadata=True)


def test_how_many_threads_measure_does_not_change_a_bit(tiny_sae: Path) -> None:
    sae = load_sae(str(tiny_sae))
    rows = 2000
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(rows, 64, generator=generator) * 3
    position = torch.arange(rows)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gatherer = CalibrationPass(special_ids=[]).gather(20, sae)
        for part in (slice(0, 1100), slice(1100, rows)):
            place = position[part]
            gatherer.add(Rows(torch.zeros_like(place), place, place, residual[part]))
        found.append(gatherer.result())
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def chunks_of(count: int) -> Iterator[list[list[int]]]:
    draw = random.Random(1)
    for _ in range(count):
        yield [[draw.randrange(5, 300) for _ in range(20)] for _ in range(4)]


def test_an_error_comes_in_its_place_and_a_chunk_that_kills_workers_ends_the_run(
    quick: EngineSpec, tmp_path: Path
) -> None:
    sae = tmp_path / "layer_20"
    shutil.copytree(quick.settings.sae[0], sae)
    spec = EngineSpec(
        model=quick.model, settings=Settings(sae=[str(sae)]), backend="transformers"
    )  # fmt: skip
    engines = RayEngines(spec, workers=2)
    try:
        assert engines.identity == spec.open().identity
        # In the order of the chunks, and the pass of each is made when it is given out.
        made: list[int] = []

        def what() -> FeaturePass:
            made.append(len(made))
            return FeaturePass()

        results = engines.run_each(what, chunks_of(30))
        for number, (chunk, result) in enumerate(zip(chunks_of(30), results, strict=True)):
            listed = FeaturePass.read(result[20])
            assert listed.token_id.tolist() == [token for row in chunk for token in row]
            assert number < len(made) <= number + 1 + 4 * 2
        # No such token: the two chunks before are there, then one sentence.
        wrong = [*chunks_of(2), [[10**6]], *chunks_of(5)]
        results = engines.run_each(FeaturePass, wrong)
        assert len([next(results), next(results)]) == 2
        with pytest.raises(EngineError, match=r"failed on chunk 3 of this run .*tokens 1000000"):
            next(results)
        assert_poison_is_named(engines)
        # And then all is well again, but not with other weights.
        assert len(list(engines.run_each(FeaturePass, chunks_of(4)))) == 4
        shutil.rmtree(sae)
        models.write_saelens_sae(sae, d_model=64, width=512, layer=20, seed=9)
        workers_of(psutil.Process())[0].kill()
        with pytest.raises(ConfigError, match="has another SAE than the others"):
            list(engines.run_each(FeaturePass, chunks_of(8)))
    finally:
        engines.close()


def assert_poison_is_named(engines: RayEngines) -> None:
    """Every worker that begins a chunk is killed."""
    over = threading.Event()

    def kill_all() -> None:
        deadline = time.monotonic() + 120
        while not over.is_set() and time.monotonic() < deadline:
            for worker in workers_of(psutil.Process(), ".run"):
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(EngineError, match="3 Ray workers died on chunk 1 ") as caught:
            engines.run(CalibrationPass(special_ids=[]), [list(range(5, 300))] * 1000)
    finally:
        over.set()
        killer.join()
    assert "\n" not in str(caught.value)


def test_what_can_not_be_is_said_in_a_sentence(
    quick: EngineSpec, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any
) -> None:
    def refused(*more: object) -> str:
        given = [str(word) for word in (*words(quick, corpus, tmp_path / "c"), *more)]
        done = CliRunner().invoke(main, given)
        assert isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code in (1, 2)
        return " ".join(done.output.split())

    assert "1000 workers do not fit the Ray cluster" in refused("--ray", "--workers", 1000)
    assert "--workers is for --ray" in refused("--workers", 2)
    assert "that is no address of a Ray cluster" in refused("--ray", quick.model)
    done = neuroscope(*words(quick, corpus, tmp_path / "c"), "--ray", "127.0.0.1:1")
    assert "no Ray cluster answers at 127.0.0.1:1" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    too_deep = Settings(sae=quick.settings.sae, layer=[77])
    with pytest.raises(SAEError, match="layer 77 does not exist"):
        RayEngines(msgspec.structs.replace(quick, settings=too_deep), workers=1)
    # Others have all there is.
    monkeypatch.setattr(ray_engines, "PLACED_S", 2.0)
    cores = int(cluster.cluster_resources()["CPU"])
    other = cluster.remote(Sleeper).options(num_cpus=cores).remote()
    assert cluster.get(other.sleep.remote()) is None
    assert "Ray found no place for 1 of 1 workers" in refused("--ray", "--workers", 1)
    cluster.kill(other)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'neuroscope-vllm[ray]'" in refused("--ray")


class Sleeper:
    def sleep(self) -> None:
        """Be there."""


@pytest.mark.parametrize(
    ("flags", "workers", "nodes", "expected"),
    [
        ((), None, [{"CPU": 2}], Plan(workers=2, gpus=0, cpus=1, parts=1)),
        ((), None, [{"CPU": 1}], Plan(workers=1, gpus=0, cpus=1, parts=1)),
        ((), None, [{"CPU": 8}, {"CPU": 8}, {}], Plan(workers=4, gpus=0, cpus=4, parts=1)),
        # Cores that would leave one of them without a place are not asked for.
        ((), 2, [{"CPU": 4}, {"CPU": 8}], Plan(workers=2, gpus=0, cpus=4, parts=1)),
        ((), None, [{"CPU": 64, "GPU": 8}], Plan(workers=8, gpus=1, cpus=1, parts=1)),
        (("-tp", "4"), None, [{"CPU": 9, "GPU": 8}], Plan(workers=2, gpus=4, cpus=1, parts=4)),
        (
            ("--tensor_parallel_size=2", "--dtype", "float32"),
            3,
            [{"CPU": 9, "GPU": 4}] * 2,
            Plan(workers=3, gpus=2, cpus=1, parts=2),
        ),
        (("-tp", "4"), None, [{"CPU": 9, "GPU": 3}] * 2, None),
        ((), 3, [{"CPU": 2}], None),
    ],
)
def test_workers_are_as_many_as_fit(
    flags: tuple[str, ...], workers: int | None, nodes: list[dict[str, float]], expected: Plan
) -> None:
    spec = EngineSpec(model="m", settings=Settings(sae=["s"]), vllm_flags=flags)
    if expected is None:
        with pytest.raises(NeuroscopeError, match=r"workers do not fit|too few for one"):
            plan(spec, workers, nodes)
    else:
        assert plan(spec, workers, nodes) == expected
