"""`neuroscope collect` killed, resumed, refused, and put in place of what was there."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from neuroscope_vllm.core.artefacts import only_writer
from neuroscope_vllm.core.examples import ExampleStore
from neuroscope_vllm.core.examples.store import SCHEMAS
from neuroscope_vllm.engine.corpus_run import CHUNK
from tests.support import models
from tests.support.collecting import (
    ONE_THREAD,
    SAMPLES,
    WANTED,
    collect,
    kill,
    refused,
    run_here,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quick(tiny_gemma2: Path, tiny_sae: Path, collected_corpus: Path) -> tuple[object, ...]:
    return (
        tiny_gemma2,
        "--sae",
        tiny_sae,
        "--backend",
        "transformers",
        "--corpus",
        collected_corpus,
    )


def test_killed_three_times_it_ends_the_same(quick: tuple[object, ...], tmp_path: Path) -> None:
    """With half-written files of all kinds lying about."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_here(*quick, *WANTED, "--output", whole).exit_code == 0
    checkpoint = tmp_path / "killed.checkpoint"
    words = (*quick, *WANTED, "--output", killed)
    draw = random.Random(os.environ.get("PYTEST_SEED", 0))
    chunks = []
    for _ in range(3):
        chunks.append(kill(words, checkpoint, draw.uniform(0, 0.15)))
        (checkpoint / f"{chunks[-1]:06}").write_bytes(b"half")
        (checkpoint / "run.partial").write_bytes(b"half")
        assert not killed.exists()
    assert chunks == sorted(chunks)
    assert 0 < chunks[-1] < SAMPLES / CHUNK
    (found,) = collect(*words, "--json", env=ONE_THREAD)
    assert found["samples"] == SAMPLES
    assert_same(killed, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed", "killed.lock", "whole", "whole.lock",
    ]  # fmt: skip


def assert_same(ours: Path, theirs: Path) -> None:
    for name in SCHEMAS:
        tables = [pq.read_table(folder / f"{name}.parquet") for folder in (ours, theirs)]
        assert tables[0].num_rows > 0
        assert tables[0].equals(tables[1])
    about = [ExampleStore(folder).collection for folder in (ours, theirs)]
    assert about[0] == msgspec.structs.replace(about[1], created=about[0].created)


def test_a_checkpoint_of_another_run_is_not_taken_for_this_ones(
    quick: tuple[object, ...], collected_corpus: Path, tmp_path: Path
) -> None:
    """Nor what was done with other weights or other text."""
    sae, text, output = tmp_path / "sae", tmp_path / "texts.jsonl", tmp_path / "e"
    shutil.copytree(str(quick[2]), sae)
    shutil.copy(collected_corpus, text)
    words = (quick[0], "--sae", sae, *quick[3:-1], text, *WANTED, "--output", output)
    checkpoint, kept = tmp_path / "e.checkpoint", tmp_path / "kept"
    assert kill(words, checkpoint, 0) >= 1
    shutil.copytree(checkpoint, kept)
    assert "is of another run" in refused(*words, "--top", 5)
    text.write_text("\n".join(collected_corpus.read_text().splitlines()[5:]))
    assert "was begun on other text" in refused(*words)
    shutil.copy(collected_corpus, text)
    for name in ("run", "000000"):
        content = (kept / name).read_bytes()
        for damaged in (content[: len(content) // 2], b""):
            (checkpoint / name).write_bytes(damaged)
            assert "can not be read" in refused(*words)
        (checkpoint / name).write_bytes(content)
    (checkpoint / "000000").unlink()
    assert "can not be read" in refused(*words)
    shutil.copy(kept / "000000", checkpoint)
    shutil.rmtree(sae)
    models.write_saelens_sae(sae, d_model=64, width=512, layer=20, seed=9)
    assert "was begun with other weights" in refused(*words)
    assert not output.exists()
    assert run_here(*words, "--restart", "--samples", 10).exit_code == 0
    assert ExampleStore(output).collection.samples == 10
    assert not checkpoint.exists()


def test_what_was_there_is_replaced_and_nothing_else_is(
    quick: tuple[object, ...], collected_corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "e"
    words = (*quick, "--output", output, "--samples")
    assert "tokens are few" in run_here(*words, 3).output
    assert "gave" not in run_here(*words, 4).output
    store = ExampleStore(output)
    assert store.collection.samples == 4
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    assert "holds other things" in refused(*quick, "--output", tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").exists()
    assert "is a file" in refused(*quick, "--output", collected_corpus)
    assert "can not be made" in refused(*quick, "--output", collected_corpus / "below")
    with only_writer(output):
        assert "another process is making" in refused(*words, 3)
    short = tmp_path / "short.txt"
    short.write_text("A heading\n\nAnother")
    assert "gave no sample of at least 16 tokens" in refused(*words, 3, "--corpus", short)
    assert ExampleStore(output).collection == store.collection


def test_what_does_not_fit_is_said(quick: tuple[object, ...], tmp_path: Path) -> None:
    other = models.write_saelens_sae(tmp_path / "sae", d_model=64, width=64, layer=5)
    two = (*quick, "--sae", other)
    assert "several SAEs; leave it out" in refused(*two, "--output", tmp_path / "e")
    assert "--before" in refused(*quick, "--before", -1)
    assert "nope.txt does not exist" in refused(*quick[:-1], "nope.txt")
