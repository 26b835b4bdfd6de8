"""A dataset repository of what was made about SAEs: what `push` writes and `pull` reads.

    README.md                          the card; the hub's viewer shows the labels
    neuroscope.json                    the manifest: what is about which SAE
    <SAE>/calibration.safetensors      as it lies in the SAE's home
    <SAE>/labels/<labeller>.parquet    a column for each field of Label

<SAE> is the name of the SAE's home (`artefacts.home`). Paths are made from it here and never taken
from a manifest, which others wrote.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.labels import Label, LabelSet, load_labels

VERSION = 1
MANIFEST = "neuroscope.json"
CARD = "README.md"
MAX_MANIFEST_BYTES = 4 << 20
MAX_CELL_BYTES = 40_000
MAX_BYTES_A_ROW = 8192
"""On average, compressed or not; a label's texts are cleaned before they are pushed."""
ROWS_AT_ONCE = 4096
_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string()}


class LabelsEntry(msgspec.Struct, kw_only=True, frozen=True):
    """Labels of one labeller."""

    count: int
    methods: list[str] = []
    models: list[str] = []


class CalibrationEntry(msgspec.Struct, kw_only=True, frozen=True):
    """What a calibration was measured on."""

    tokens: int
    corpus: str = ""
    created: str = ""


class Entry(msgspec.Struct, kw_only=True, frozen=True):
    """What there is about one SAE.

    Attributes:
        sae: Its address, without a revision.
        commit: Of the SAE that was calibrated and labelled.
        model: Model whose residuals were read.
    """

    sae: str
    commit: str
    width: int
    layer: int | None = None
    model: str | None = None
    calibration: CalibrationEntry | None = None
    labels: dict[str, LabelsEntry] = {}


class Manifest(msgspec.Struct, kw_only=True, frozen=True):
    """`neuroscope.json`. `saes` by the name of the SAE's home."""

    version: int = VERSION
    license: str | None = None
    saes: dict[str, Entry] = {}

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"


def read_manifest(path: Path, repo: str) -> Manifest:
    """Raises ConfigError if the repository's manifest is not one, or is of another version."""
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ConfigError(f"the {MANIFEST} of {repo} is too large to be one; name another dataset.")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"the {MANIFEST} of {repo} cannot be read ({error}); name a dataset that `neuroscope "
            f"push` wrote."
        ) from error
    if manifest.version != VERSION:
        raise ConfigError(
            f"{repo} is of version {manifest.version}, and this neuroscope reads version "
            f"{VERSION}; update the older one."
        )
    return manifest


def key_of(source: str) -> str:
    """The folder of an SAE in the repository."""
    return artefacts.home(source).name


def calibration_path(source: str) -> str:
    return f"{key_of(source)}/{artefacts.CALIBRATION}"


def labels_path(source: str, labeller: str) -> str:
    """Raises ConfigError if the labeller cannot name a file."""
    return f"{key_of(source)}/labels/{artefacts.labels_file(source, labeller).stem}.parquet"


def labels_to_parquet(labels: LabelSet) -> bytes:
    """A row a label, by ascending index; the same bytes for the same labels."""
    rows = [label.to_dict() for label in labels]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), buffer, compression="zstd")
    return buffer.getvalue()


def labels_from_parquet(path: Path, labeller: str, width: int, staging: Path) -> LabelSet:
    """The labels in a parquet file, with every check that a label file gets.

    Args:
        labeller: Whose they must be.
        width: Of the SAE; every index must lie below.
        staging: A folder to write in.

    Raises:
        ConfigError: It is damaged, too large for so many features, or holds something else.
    """
    try:
        rows = _read_rows(path, width)
        labels = msgspec.convert(rows, list[Label])
    except (pa.ArrowException, msgspec.ValidationError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"labels {path} are not labels in parquet ({error}); push them again."
        ) from error
    for label in labels:
        if label.index >= width or label.labeller != labeller:
            raise ConfigError(
                f"labels {path} hold a label of feature {label.index} by {label.labeller!r}, but "
                f"are of {width} features by {labeller!r}; push them again for this SAE."
            )
    staged = staging / f"{labeller}.jsonl"
    staged.write_bytes(b"".join(msgspec.json.encode(label) + b"\n" for label in labels))
    return load_labels(staged)


def _schema() -> pa.Schema:
    return pa.schema(
        [
            pa.field(field.name, _ARROW[_plain_type(field.type)], nullable=not field.required)
            for field in msgspec.structs.fields(Label)
        ]
    )


def _plain_type(annotation: Any) -> type:
    """`int` of `int | None`."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if kinds else annotation


def _read_rows(path: Path, width: int) -> list[dict[str, Any]]:
    """Rows of the known columns. Raises ConfigError where their size says they are no labels.

    What the footer says is checked before anything is read; as it may lie, what comes is, too.
    """
    most = MAX_BYTES_A_ROW * width + (1 << 20)
    too_large = ConfigError(f"labels {path} are too large for {width} features; do not use them.")
    if path.stat().st_size > most:
        raise too_large
    metadata = pq.read_metadata(path)
    if metadata.num_rows > width:
        raise ConfigError(
            f"labels {path} are {metadata.num_rows} of an SAE of {width} features; push them again "
            f"for this SAE."
        )
    most = MAX_BYTES_A_ROW * metadata.num_rows + (1 << 20)
    top_level = metadata.schema.to_arrow_schema().names
    known = [field for field in _schema() if field.name in top_level]
    if _unpacked_bytes(metadata, {field.name for field in known}) > most:
        raise too_large
    texts = [field.name for field in known if field.type == pa.string()]
    rows, size = [], 0
    with pq.ParquetFile(path, metadata=metadata, read_dictionary=texts) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[field.name for field in known]):
            size += sum(_text_bytes(path, name, batch.column(name)) for name in texts)
            if size > most:
                raise too_large
            rows += batch.to_pylist()
    return rows


def _unpacked_bytes(metadata: pq.FileMetaData, names: set[str]) -> int:
    """What these columns take before compression, as the footer says."""
    chunks = (
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    )
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in names
    )


def _text_bytes(path: Path, name: str, column: pa.Array) -> int:
    """What a column's texts take as rows. Raises ConfigError if one is too long, or is no text."""
    # As a dictionary: a few long texts, repeated, would fill the memory as rows.
    if not isinstance(column, pa.DictionaryArray):
        raise ConfigError(f"labels {path} have a {name} that is no text; do not use them.")
    lengths = pc.call_function("binary_length", [column.dictionary])
    if (pc.call_function("max", [lengths]).as_py() or 0) > MAX_CELL_BYTES:
        raise ConfigError(f"labels {path} have a {name} of absurd length; do not use them.")
    return pc.call_function("sum", [lengths.take(column.indices)]).as_py() or 0
