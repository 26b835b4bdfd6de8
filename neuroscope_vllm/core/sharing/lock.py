"""The lock file: which commit of which repository a pull brought. Torch-free.

JSON, sorted, one value a line, so that it reads and differs well under version control:

    {"version": 1,
     "model": {"type": "model", "repo": "google/gemma-2-2b-it", "commit": "…", "files": ["…"]},
     "saes": [{"type": "model", "repo": "google/gemma-scope-…", "commit": "…", "path": "…"}],
     "artefacts": {"type": "dataset", "repo": "…", "commit": "…", "sha256": {"<file>": "…"}}}
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec

from neuroscope_vllm.core.artefacts import write_whole
from neuroscope_vllm.core.errors import LockError

VERSION = 1
LOCK_FILE = "neuroscope.lock"
MAX_BYTES = 16 << 20
REMEDY = "delete it and name what is to be pulled (`neuroscope pull MODEL --sae SAE`)"

_COMMIT = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class _Locked(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A repository at a commit."""

    repo: str
    commit: str

    def __post_init__(self) -> None:
        if not REPO.fullmatch(self.repo) or not _COMMIT.fullmatch(self.commit):
            raise ValueError(f"{self.repo}@{self.commit} is not a repository at a commit")


class LockedModel(_Locked, frozen=True, tag="model", tag_field="type"):
    """The files of a model that vLLM loads."""

    files: list[str]


class LockedSAE(_Locked, frozen=True, tag="model", tag_field="type"):
    """An SAE: a folder of a repository."""

    path: str

    @property
    def source(self) -> str:
        """Its address at the commit, as `--sae` takes it."""
        return f"hf://{self.repo}@{self.commit}" + (f"/{self.path}" if self.path else "")

    @property
    def name(self) -> str:
        """Its address at no particular commit."""
        return f"hf://{self.repo}" + (f"/{self.path}" if self.path else "")


class LockedArtefacts(_Locked, frozen=True, tag="dataset", tag_field="type"):
    """Calibrations and labels, by the hash of each file."""

    sha256: dict[str, str]


class Lock(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    version: int = VERSION
    model: LockedModel | None = None
    saes: list[LockedSAE] = []
    artefacts: LockedArtefacts | None = None

    def save(self, path: Path) -> None:
        """Write it; the file is replaced whole or not at all. Raises OSError."""
        content = json.dumps(msgspec.to_builtins(self), indent=2, sort_keys=True)
        write_whole(path, content.encode() + b"\n")


def check_kept(old: Lock, new: Lock, path: Path) -> None:
    """Raise LockError if the new lock, which is to replace the old, is not about all that that is.

    Another commit of the same repository is not lost, but what a pull by name is for.
    """
    gone = [f"model {old.model.repo}"] if old.model and not _same(old.model, new.model) else []
    names = {sae.name for sae in new.saes}
    gone += [f"SAE {sae.name}" for sae in old.saes if sae.name not in names]
    if old.artefacts and not _same(old.artefacts, new.artefacts):
        gone.append(f"dataset {old.artefacts.repo}")
    if gone:
        raise LockError(
            f"lock file {path} has {', '.join(gone)}, which this pull would drop from it; name "
            f"that too, choose another file with --lock, or delete this one first."
        )


def _same(old: _Locked, new: _Locked | None) -> bool:
    return new is not None and new.repo == old.repo


def load_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        LockError: It is not there, is damaged, or is of another version.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise LockError(
            f"lock file {path} cannot be read ({error.strerror}); make it with `neuroscope pull "
            f"MODEL --sae SAE`."
        ) from error
    try:
        version = msgspec.json.decode(content, type=dict[str, msgspec.Raw]).get("version")
        if version is not None and bytes(version) != str(VERSION).encode():
            raise LockError(
                f"lock file {path} is of version {bytes(version).decode()}, and this neuroscope "
                f"reads version {VERSION}; {REMEDY}."
            )
        return msgspec.json.decode(content, type=Lock)
    except msgspec.DecodeError as error:
        raise LockError(
            f"lock file {path} is damaged ({error}); restore it, or {REMEDY}."
        ) from error
