"""Examples on disk, as readers find them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.examples import (
    Collection,
    Context,
    Example,
    ExampleStore,
    FeatureSummary,
    write_examples,
)
from neuroscope_vllm.core.examples.store import SCHEMAS

COLLECTION = Collection(
    sae="/sae", sae_digest="d", layer=20, model="m", corpus="c", created="2026-01-01", width=9000,
    samples=3, tokens=30, before=2, after=1, top=20, sample=60,
)  # fmt: skip


def example(feature: int, kind: str = "top", activation: float = 1.0) -> Example:
    return Example(
        feature=feature, kind=kind, activation=activation, sequence=1, position=2, held_out=False,
        tokens=["a", " b", " ü"], activations=[0.0, 0.5, activation], at=2,
    )  # fmt: skip


CONTEXT = Context(sequence=2, position=0, tokens=["x"], features=[1, 5], activations=[0.5, 2.0])
SUMMARY = FeatureSummary(feature=0, firings=7, max_activation=3.5, partners=[4], together=[2])
EXAMPLES = [
    *(example(feature, "top", 2.0 - feature / 9000) for feature in range(8000)),
    example(8000, "top", 3.0),
    example(8000, "top", 2.0),
    example(8000, "sample", 2.0),
]


def write(folder: Path, examples: list[Example], collection: Collection = COLLECTION) -> None:
    rows = {"examples": examples, "features": [SUMMARY], "contexts": [CONTEXT]}
    batches = {
        name: [pa.RecordBatch.from_pylist(msgspec.to_builtins(rows[name]), schema=schema)]
        for name, schema in SCHEMAS.items()
    }
    write_examples(folder, collection, batches)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "examples", EXAMPLES)
    store = ExampleStore(tmp_path / "examples")
    assert store.collection == COLLECTION
    assert (store.features, store.contexts) == ([SUMMARY], [CONTEXT])
    assert store.of(8000) == EXAMPLES[8000:]
    for feature in (0, 4095, 4096, 7999):
        assert [e.feature for e in store.of(feature)] == [feature]
    assert store.of(8001) == store.of(70000) == []


def test_a_new_collection_takes_the_place_of_the_old(tmp_path: Path) -> None:
    write(tmp_path / "examples", EXAMPLES)
    write(tmp_path / "examples", EXAMPLES[:1])
    assert ExampleStore(tmp_path / "examples").of(8000) == []
    assert [path.name for path in tmp_path.iterdir()] == ["examples"]


def test_what_is_no_collection_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neuroscope collect"):
        ExampleStore(tmp_path / "none")
    write(tmp_path / "one", EXAMPLES)
    write(tmp_path / "two", EXAMPLES, msgspec.structs.replace(COLLECTION, created="2026-02-02"))
    (tmp_path / "two/contexts.parquet").rename(tmp_path / "one/contexts.parquet")
    with pytest.raises(ConfigError, match="do not belong together"):
        ExampleStore(tmp_path / "one")
    pq.write_table(pa.table({"feature": [1]}), tmp_path / "two/contexts.parquet")
    with pytest.raises(ConfigError, match="can not be read"):
        ExampleStore(tmp_path / "two")
    (tmp_path / "two/contexts.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ConfigError, match="can not be read"):
        ExampleStore(tmp_path / "two")


def test_a_damaged_page_is_said(tmp_path: Path) -> None:
    write(tmp_path / "examples", EXAMPLES)
    path = tmp_path / "examples/examples.parquet"
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[4:half] = bytes(half - 4)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="are damaged"):
        ExampleStore(tmp_path / "examples").of(0)


def test_a_collections_name_is_of_its_weights_and_texts() -> None:
    replace = msgspec.structs.replace
    again = replace(COLLECTION, created="2027-01-01", sae="elsewhere", sink_norm=3.0)
    assert again.name == COLLECTION.name
    assert replace(COLLECTION, sae_digest="e").name.split(".")[1] == COLLECTION.name.split(".")[1]
    assert replace(COLLECTION, corpus="d").name.split(".")[1] != COLLECTION.name.split(".")[1]
