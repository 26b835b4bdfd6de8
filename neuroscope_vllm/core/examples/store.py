"""Examples on disk: three parquet files in one folder, which anything that reads parquet can read.

    examples.parquet   a row an example, by feature, then kind (top first), then rank
    features.parquet   a row a feature
    contexts.parquet   a row a context

Their columns are the fields of `records`; each file's metadata holds the `Collection`, as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from neuroscope_vllm.core.artefacts import examples_name, homes
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.examples.records import Collection, Context, Example, FeatureSummary

METADATA = b"neuroscope"
ROW_GROUP = 4096  # rows read at least, to find one feature's

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_TEXTS = pa.list_(pa.string())
SCHEMAS = {
    "examples": pa.schema(
        {
            "feature": pa.int32(),
            "kind": pa.string(),
            "activation": pa.float32(),
            "sequence": pa.int32(),
            "position": pa.int32(),
            "held_out": pa.bool_(),
            "tokens": _TEXTS,
            "activations": _FLOATS,
            "at": pa.int32(),
        }
    ),
    "features": pa.schema(
        {
            "feature": pa.int32(),
            "firings": pa.int64(),
            "max_activation": pa.float32(),
            "partners": _INTS,
            "together": pa.list_(pa.int64()),
        }
    ),
    "contexts": pa.schema(
        {
            "sequence": pa.int32(),
            "position": pa.int32(),
            "tokens": _TEXTS,
            "features": _INTS,
            "activations": _FLOATS,
        }
    ),
}


def find_examples(source: str, sae_input: str = "raw") -> Path | None:
    """The folder of an SAE's examples, if there are some."""
    name = examples_name(sae_input)
    return next((path for folder in homes(source) if (path := folder / name).is_dir()), None)


def write_examples(
    folder: Path, collection: Collection, tables: Mapping[str, Iterable[pa.RecordBatch]]
) -> None:
    """Write the three files, in place of what is there, whole or not at all.

    Args:
        tables: Batches of each of SCHEMAS, in the order that it asks for.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    note = {METADATA: msgspec.json.encode(collection)}
    for name, schema in SCHEMAS.items():
        path = partial / f"{name}.parquet"
        with pq.ParquetWriter(path, schema.with_metadata(note), compression="zstd") as writer:
            for batch in tables[name]:
                writer.write_batch(batch, row_group_size=ROW_GROUP)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class ExampleStore:
    """The examples of one SAE.

    Attributes:
        folder: Where they lie.
        collection: Where they are from.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: There are none, or they can not be read.
        """
        self.folder = folder
        try:
            files = {name: pq.ParquetFile(folder / f"{name}.parquet") for name in SCHEMAS}
            notes = {(file.schema_arrow.metadata or {}).get(METADATA) for file in files.values()}
            self.collection = msgspec.json.decode(notes.pop() or b"", type=Collection)
            wrong = [n for n, file in files.items() if not file.schema_arrow.equals(SCHEMAS[n])]
            if notes or wrong:
                raise ValueError("its files do not belong together")
            first = [
                files["examples"].metadata.row_group(i).column(0).statistics
                for i in range(files["examples"].num_row_groups)
            ]
            self._ranges = np.array([(s.min, s.max) for s in first]).reshape(-1, 2)
        except (OSError, ValueError, pa.ArrowException, AttributeError) as error:
            raise ConfigError(
                f"examples {folder} can not be read ({error}); make them with `neuroscope collect`."
            ) from error
        self._files = files
        self._group = functools.lru_cache(maxsize=4)(files["examples"].read_row_group)

    @functools.cached_property
    def features(self) -> list[FeatureSummary]:
        """Every feature of the SAE, by index."""
        return msgspec.convert(self.table("features").to_pylist(), list[FeatureSummary])

    @functools.cached_property
    def contexts(self) -> list[Context]:
        return msgspec.convert(self.table("contexts").to_pylist(), list[Context])

    def of(self, feature: int) -> list[Example]:
        """The examples of a feature: TOP, strongest first; then SAMPLE, in random order."""
        low, high = self._ranges[:, 0], self._ranges[:, 1]
        groups = np.flatnonzero((low <= feature) & (feature <= high))
        rows: list[dict[str, Any]] = []
        with self._said():
            for group in map(self._group, groups.tolist()):
                rows += group.filter(pc.field("feature") == feature).to_pylist()
        return msgspec.convert(rows, list[Example])

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One of the files, or some of its columns. Raises ConfigError: It is damaged."""
        with self._said():
            return self._files[name].read(columns)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """What a damaged page raises, as a ConfigError."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"examples {self.folder} are damaged ({error}); make them again with `neuroscope"
                " collect`."
            ) from error
