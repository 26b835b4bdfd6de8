"""Parquet files of recorded traces, which anything that reads parquet can read.

A file holds whole traces, one after another, as `rows.SCHEMA` says; its metadata tells under
`neuroscope` which they are and what served them, as JSON. `time` is when an event was told, `json`
what is no token. With DuckDB:

    SELECT f.label, count(*) FROM (SELECT unnest(top_features) f FROM 'DIR/*/*.parquet') GROUP BY 1
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.recording import folder as folders
from neuroscope_vllm.core.recording.record import About, Head, RecordedTrace, aliases
from neuroscope_vllm.core.recording.rows import SCHEMA, to_batches, to_events

METADATA = b"neuroscope"
VERSION = 1
ROW_GROUP = 8192  # rows read at least, to find one trace's


class _Footer(msgspec.Struct, kw_only=True):
    """A file's metadata; `traces` are in the order of its rows."""

    version: int = VERSION
    about: About
    traces: list[Head]


def file_content(about: About, heads: Sequence[Head], batches: Iterable[pa.RecordBatch]) -> bytes:
    """A file: whole traces, whose rows are in the batches in the order of their heads."""
    footer = msgspec.json.encode(_Footer(about=about, traces=list(heads)))
    schema = SCHEMA.with_metadata({METADATA: footer})
    table = pa.Table.from_batches(batches, schema=SCHEMA).cast(schema)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=ROW_GROUP, compression="zstd", write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def to_file(about: About, traces: Sequence[RecordedTrace]) -> bytes:
    """The same of traces that are all in memory. Raises ConfigError: No server told them."""
    heads = [head for head, _ in traces]
    try:
        return file_content(about, heads, to_batches(traces, about.redact))
    except (pa.ArrowException, OverflowError) as error:
        raise ConfigError(
            f"{heads[0].request_id} can not be written as parquet ({error}); JSON lines hold it."
        ) from None


def write_traces(
    folder: Path, about: About, traces: Sequence[RecordedTrace], when: float | None = None
) -> Path:
    """Add a file with some traces to a recording, which is made if it is not there.

    Args:
        when: In unix seconds, which tell the day; None: now.

    Raises:
        OSError: It can not be written; nothing is left behind.
    """
    epoch, number = traces[0].head.epoch, 0
    when = time.time() if when is None else when
    while (path := folders.day_file(folder, epoch, number, when)).exists():
        number += 1
    folders.write_private(path, to_file(about, traces))
    return path


def read_traces(
    path: str | os.PathLike[str], request_id: str | None = None
) -> Iterator[RecordedTrace]:
    """The traces of a recording, a folder or one of its files, by when they began; or those of one
    request, by any of its ids. One at a time is in memory. Raises ConfigError."""
    recording = Recording(path)
    places = recording.places if request_id is None else recording.find(request_id)
    for place in places:
        yield recording.read(place)


class Place(NamedTuple):
    """Where a trace lies, and what served it."""

    head: Head
    file: Path
    row: int
    about: About


class Recording:
    """What was recorded; reads the files' metadata, and traces when they are asked for.

    Attributes:
        about: What served them, after the newest file; the sites of all.
        places: The traces, by when they began.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            ConfigError: There is none, or a file of it is damaged.
        """
        self.path = Path(path).expanduser()
        found = [(file, footer) for file in folders.files(self.path) if (footer := _footer(file))]
        if not found:
            raise ConfigError(
                f"{path} holds no recording; give the folder of `serve --record`, or a file that"
                " `neuroscope export --parquet` wrote."
            )
        found.sort(key=lambda one: max((h.created for h in one[1].traces), default=0.0))
        sites = {site.layer: site for _, one in found for site in one.about.sites}
        newest = found[-1][1].about
        self.about = msgspec.structs.replace(
            newest, sites=[sites[layer] for layer in sorted(sites)]
        )
        self.places = [place for file, footer in found for place in _places(file, footer)]
        self.places.sort(key=lambda place: (place.head.began, place.head.choice))
        self._table = functools.lru_cache(maxsize=4)(_read_group)

    def find(self, request_id: str) -> list[Place]:
        """The choices of a request, by any of its ids."""
        return [
            place
            for place in self.places
            if request_id in aliases(place.head.request_id, place.head.internal_id)
        ]

    def choose(self, request_ids: Sequence[str]) -> list[Place]:
        """The choices of these requests, or all if none is named, by when they began.

        Raises:
            ConfigError: One is not there.
        """
        for request_id in request_ids:
            if not self.find(request_id):
                raise ConfigError(
                    f"request {request_id!r} is not in {self.path}; it has {len(self.places)}, such"
                    f" as {self.places[-1].head.request_id}, all of which have ended."
                )
        chosen = {place[1:3] for one in request_ids for place in self.find(one)}
        return [place for place in self.places if not request_ids or place[1:3] in chosen]

    def read(self, place: Place) -> RecordedTrace:
        """Raises ConfigError: The file is damaged, or is gone."""
        try:
            table = self._rows(place)
            events = to_events(table)
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            raise _damaged(place.file, error) from None
        if len(events) != place.head.events:
            raise _damaged(place.file, ValueError("rows are missing"))
        return RecordedTrace(place.head, events)

    def _rows(self, place: Place) -> pa.Table:
        start, stop = place.row, place.row + place.head.events
        groups = range(start // ROW_GROUP, (stop - 1) // ROW_GROUP + 1)
        table = pa.concat_tables([self._table(place.file, group) for group in groups])
        return table.slice(start - groups[0] * ROW_GROUP, stop - start)


def _footer(file: Path) -> _Footer | None:
    """None: the file is not ours."""
    try:
        content = (pq.read_schema(file).metadata or {}).get(METADATA)
        if content is None:
            return None
        version = msgspec.json.decode(content, type=_Version).version
        if version == VERSION:
            return msgspec.json.decode(content, type=_Footer)
    except (OSError, pa.ArrowException, msgspec.MsgspecError, ValueError) as error:
        raise _damaged(file, error) from None
    raise ConfigError(
        f"{file} is a recording of version {version} and this is neuroscope-vllm for version"
        f" {VERSION}; read it with the one that wrote it."
    )


class _Version(msgspec.Struct):
    version: int = 0


def _damaged(file: Path, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(f"{file} can not be read ({reason}); move it out of the recording.")


def _read_group(file: Path, group: int) -> pa.Table:
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        return opened.read_row_group(group)


def _places(file: Path, footer: _Footer) -> Iterator[Place]:
    row = 0
    for head in footer.traces:
        yield Place(head, file, row, footer.about)
        row += head.events
