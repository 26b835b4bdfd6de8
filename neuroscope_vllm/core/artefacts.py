"""Where what was made about an SAE lies: its calibration, labels and examples. Torch-free.

What ships with an SAE lies beside it; what `calibrate`, `collect`, `label` and `pull` make lies in
the data folder and comes first:

    <home>/calibration.safetensors
    <home>/labels/<labeller>.jsonl
    <home>/scores/<labeller>.jsonl
    <home>/examples/*.parquet
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from neuroscope_vllm.core.errors import ConfigError

DATA_VARIABLE = "NEUROSCOPE_DATA"
CALIBRATION = "calibration.safetensors"
_FILES = {".npz", ".safetensors", ".pt"}  # an address may be that of a file in the SAE's folder
_REVISION = re.compile(r"^(hf://[^/]+/[^/@]+)@[^/]+")


def data_dir() -> Path:
    """What we keep: $NEUROSCOPE_DATA, else the user's data folder."""
    if given := os.environ.get(DATA_VARIABLE):
        return Path(given).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "neuroscope"


def home(source: str) -> Path:
    """The folder for what is made about the SAE at `source`, a path or an hf:// address.

    The same for all revisions of a hub SAE; a local one is known by its absolute path.
    """
    if source.startswith("hf://"):
        address = _REVISION.sub(r"\1", source).removeprefix("hf://").strip("/")
        if PurePosixPath(address).suffix in _FILES:
            address = str(PurePosixPath(address).parent)
        return data_dir() / "saes" / address.replace("/", "--")
    folder = sae_folder(source).resolve()
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    return data_dir() / "saes" / f"{folder.name}-{digest}"


def homes(source: str) -> list[Path]:
    """Where to look for what is known about an SAE, best first."""
    local = [] if source.startswith("hf://") else [sae_folder(source)]
    return [home(source), *local]


def sae_folder(source: str) -> Path:
    """The folder of a local SAE, which may be given by one of its files."""
    path = Path(source).expanduser()
    return path.parent if path.is_file() else path


def calibration_name(sae_input: str = "raw") -> str:
    return CALIBRATION if sae_input == "raw" else f"calibration-{sae_input}.safetensors"


def examples_name(sae_input: str = "raw") -> str:
    return "examples" if sae_input == "raw" else f"examples-{sae_input}"


def find_calibration(source: str, sae_input: str = "raw") -> Path | None:
    name = calibration_name(sae_input)
    return next((path for folder in homes(source) if (path := folder / name).is_file()), None)


def pinned(source: str, revision: str | None) -> str:
    """A hub address at a commit; a local path as it is."""
    if revision is None:
        return source
    return re.sub(r"^(hf://[^/]+/[^/@]+)(@[^/]+)?", rf"\1@{revision}", source)


def find_labels(source: str) -> list[Path]:
    """One file a labeller, by name of the labeller; of two with one name, the better home's."""
    found: dict[str, Path] = {}
    for folder in reversed(homes(source)):
        found |= {path.name: path for path in folder.glob("labels/*.jsonl")}
    return [found[name] for name in sorted(found)]


def labels_file(source: str, labeller: str) -> Path:
    """Where the labels of a labeller are kept.

    Raises:
        ConfigError: The name could lead elsewhere, or is no file name.
    """
    if not re.fullmatch(r"[\w][\w.+-]{0,99}", labeller):
        raise ConfigError(
            f"labeller {labeller!r} can not name a file; use letters, digits, and . _ + -."
        )
    return home(source) / "labels" / f"{labeller}.jsonl"


def scores_file(source: str, labeller: str) -> Path:
    """Where the answers are kept that a labeller's scores rest on. Raises ConfigError as above."""
    return home(source) / "scores" / labels_file(source, labeller).name


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other processes from making the same file.

    Raises:
        ConfigError: One is at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    guard = path.with_name(path.name + ".lock")
    with guard.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another process is making {path}; wait for it, or write to another file."
            ) from None
        yield  # the guard stays: deleting it would let two in


def model_files(model: str) -> str:
    """Sizes and times of a local model's files, which tell when it was replaced; nothing of a model
    on the hub."""
    files = sorted(path for path in Path(model).expanduser().glob("*") if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16] if stats else ""


def keep_old(path: Path, content: bytes) -> Path | None:
    """Keep a file that is about to be replaced under a name that nothing reads, which is returned;
    None if there is none, or it already holds `content`."""
    if not path.is_file() or (there := path.read_bytes()) == content:
        return None
    old = path.with_name(f"{path.name}.{hashlib.sha256(there).hexdigest()[:8]}.old")
    write_whole(old, there)
    return old


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is replaced whole or not at all, also if the machine dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
