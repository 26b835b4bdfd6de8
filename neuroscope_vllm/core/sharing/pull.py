"""Fetch a model, its SAEs, and what was made about them, each at one commit.

`resolve` turns names into a Lock; `fetch` brings exactly what a Lock says. Repositories go to the
hub's own cache; calibrations and labels to the SAE's home, whole, and last, so that a pull that
fails leaves nothing half done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.errors import (
    ConfigError,
    LockError,
    NoFileError,
    UnreachableError,
)
from neuroscope_vllm.core.sae.canonical import SUITE, canonical_source
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sharing import package
from neuroscope_vllm.core.sharing.lock import REPO, Lock, LockedArtefacts, LockedModel, LockedSAE
from neuroscope_vllm.core.sharing.repository import (
    Repository,
    commit_of,
    disk_errors,
    fetch_file,
    list_files,
)

if TYPE_CHECKING:
    from neuroscope_vllm.core.sae.hub import HubAddress

logger = logging.getLogger(__name__)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# What vLLM loads: never a pickle, and not the copies in other formats that lie in folders.
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
NOT_WANTED = ("*/*", "consolidated*")
MAX_CALIBRATION_BYTES_A_FEATURE = 4096


class Pulled(NamedTuple):
    """What a pull brought.

    Attributes:
        saes: In the order of the lock.
        installed: Calibrations and labels that are now in place.
        kept: Files of the user that were there, under their new names.
    """

    lock: Lock
    saes: list[SAEInfo]
    installed: list[Path]
    kept: list[Path]


def resolve(
    model: str | None, revision: str | None, sources: Sequence[str], dataset: str | None
) -> Lock:
    """The commits that names stand for now; small files are downloaded to learn them.

    Args:
        model: A model's repository.
        revision: Its branch, tag or commit.
        sources: hf:// addresses of SAEs; empty with a dataset: all that it is about.
        dataset: `org/repo[@revision]` of a dataset that `push` wrote.

    Raises:
        DownloadError, SAEError, ConfigError: As `fetch`.
    """
    locked_artefacts = None
    name, _, at = (dataset or "").partition("@")
    for repo in (model, name):
        if repo and not REPO.fullmatch(repo):
            raise ConfigError(
                f"{repo!r} is not a repository on the hub; write org/repo, as its page does."
            )
    if dataset is not None:
        commit, manifest = _manifest(Repository(name, "dataset", at or None))
        locked_artefacts = LockedArtefacts(repo=name, commit=commit, sha256={})
        if not sources:
            entries = [manifest.saes[key] for key in sorted(manifest.saes)]
            sources = [_address(entry.sae).at(entry.commit) for entry in entries]
    return Lock(
        model=None if model is None else _resolve_model(Repository(model, "model", revision)),
        saes=[_resolve_sae(source) for source in sources],
        artefacts=locked_artefacts,
    )


def sae_sources(names: Sequence[str], layers: Sequence[int], model: str | None) -> list[str]:
    """Addresses of the SAEs that a user named; `gemma-scope` stands for one on each layer.

    Raises:
        ConfigError: A name is a local path, or needs a model or a layer that was not given.
        SAEError: The suite has no such SAE.
    """
    found = []
    for name in names:
        if name == SUITE:
            if model is None or not layers:
                raise ConfigError(
                    f"sae is {SUITE}, which is one SAE for each model and layer; give MODEL and "
                    f"--layer, or the SAE's hf:// address."
                )
            found += [canonical_source(model, layer) for layer in layers]
        elif name.startswith("hf://"):
            found.append(name)
        else:
            raise ConfigError(
                f"sae {name} is not on the hub, so there is nothing to pull; give an hf:// address "
                f"or {SUITE}, or serve the local one as it is."
            )
    if layers and SUITE not in names:
        raise ConfigError(
            f"layer chooses among the SAEs of {SUITE}, but sae is {', '.join(names) or 'not given'}"
            f"; an address says its layer itself, so leave --layer out."
        )
    return found


def check_request(
    lock: Lock,
    path: Path,
    model: str | None,
    revision: str | None,
    sources: Sequence[str],
    dataset: str | None,
) -> None:
    """Raise LockError if a lock is not about what was asked; arguments are those of `resolve`."""
    name, _, at = (dataset or "").partition("@")
    asked = [_address(source) for source in sources]
    locked = {sae.name: sae.commit for sae in lock.saes}
    model_commit = lock.model and lock.model.commit
    package_commit = lock.artefacts and lock.artefacts.commit
    pairs = [
        ("model", model, lock.model and lock.model.repo),
        ("dataset", name, lock.artefacts and lock.artefacts.repo),
        ("SAE", {address.at(None) for address in asked}, set(locked)),
        ("revision", revision, model_commit),
        ("revision", at, package_commit),
        *(("revision", address.revision, locked.get(address.at(None))) for address in asked),
    ]
    for what, wanted, found in pairs:
        if wanted and wanted != found:
            shown = [", ".join(sorted(v)) if isinstance(v, set) else v for v in (found, wanted)]
            raise LockError(
                f"lock file {path} has {what} {shown[0] or 'none'}, but {shown[1]} was asked for; "
                f"leave it out, or pull without --locked."
            )


def fetch(lock: Lock, *, locked: bool) -> Pulled:
    """Bring what a lock says; what the cache already has is not fetched again.

    Args:
        locked: Hold calibrations and labels to the hashes in the lock; else fill these in.

    Raises:
        LockError: A file is not the one in the lock.
        DownloadError: The hub does not give something; one of its kinds.
        SAEError: An SAE is damaged or of an unknown kind.
        ConfigError: A calibration or label file cannot be used, or is of another SAE.
    """
    if lock.model is not None:
        repository = Repository(lock.model.repo, "model", lock.model.commit)
        for name in lock.model.files:
            fetch_file(repository, name)
    saes = [_read_info(sae.source) for sae in lock.saes]
    if lock.artefacts is None:
        return Pulled(lock, saes, [], [])
    repository = Repository(lock.artefacts.repo, "dataset", lock.artefacts.commit)
    _, manifest = _manifest(repository)
    folder = Path(tempfile.gettempdir())
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix="neuroscope-") as staging:
        found = [
            file
            for sae, info in zip(lock.saes, saes, strict=True)
            for file in _artefacts(repository, manifest, sae, info, Path(staging))
        ]
    if not found:
        about = ", ".join(entry.sae for entry in manifest.saes.values())
        raise ConfigError(
            f"{repository} has nothing about {', '.join(sae.name for sae in lock.saes) or 'no SAE'}"
            f"; it is about {about or 'none'}, of which --sae is to name one."
        )
    hashes = {file.path: file.sha256 for file in found}
    if locked and hashes != lock.artefacts.sha256:
        odd = sorted(dict(hashes.items() ^ lock.artefacts.sha256.items()))
        raise LockError(
            f"{', '.join(odd)} of {lock.artefacts.repo} is not what the lock file says; "
            f"restore the lock file, or lock what is there now by naming all of it (`neuroscope "
            f"pull MODEL --sae SAE --from {lock.artefacts.repo}`)."
        )
    installed, kept = [], []
    for file in found:
        with disk_errors(file.target):
            old = _install(file)
        installed.append(file.target)
        kept += [old] if old else []
    lock = msgspec.structs.replace(
        lock, artefacts=msgspec.structs.replace(lock.artefacts, sha256=hashes)
    )
    return Pulled(lock, saes, installed, kept)


class _Artefact(NamedTuple):
    """A checked file of a dataset, and where its content belongs."""

    path: str
    sha256: str
    target: Path
    content: bytes


def _resolve_model(repository: Repository) -> LockedModel:
    try:
        config = fetch_file(repository, CONFIG)
    except NoFileError as error:
        raise NoFileError(
            f"{repository} has no {CONFIG}, so it is not a model that vLLM loads; name another "
            f"repository."
        ) from error
    repository = repository.at(commit_of(config))
    try:
        names = list_files(repository)
    except UnreachableError:
        names = _cached_model(config)
        if names is None:
            raise
    files = sorted(name for name in names if _is_wanted(name))
    if not any(name.endswith(".safetensors") for name in files):
        raise NoFileError(
            f"{repository} has no weights in safetensors, and pickles are not pulled; name a "
            f"repository that has them."
        )
    return LockedModel(repo=repository.name, commit=commit_of(config), files=files)


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED) and not any(
        fnmatch(name, pattern) for pattern in NOT_WANTED
    )


def _cached_model(config: Path) -> list[str] | None:
    """The files of a model in the cache, where no weights are missing from it."""
    names = {path.name for path in config.parent.iterdir()}
    try:
        index = json.loads((config.parent / INDEX).read_bytes())
        shards = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shards = {"model.safetensors"}
    return sorted(names) if shards <= names else None


# Torch is imported late, with what reads SAEs: a model alone, and most errors, need none of it.


def _read_info(source: str) -> SAEInfo:
    from neuroscope_vllm.core.sae.load import read_sae_info

    return read_sae_info(source)


def _address(source: str) -> HubAddress:
    from neuroscope_vllm.core.sae.hub import parse_address

    return parse_address(source)


def _resolve_sae(source: str) -> LockedSAE:
    info = _read_info(source)
    address = _address(source)
    assert info.revision is not None  # every SAE on the hub has a commit
    return LockedSAE(repo=address.repo, commit=info.revision, path=address.path)


def _manifest(repository: Repository) -> tuple[str, package.Manifest]:
    try:
        path = fetch_file(repository, package.MANIFEST)
    except NoFileError as error:
        raise NoFileError(
            f"{repository} has no {package.MANIFEST}, so it was not written by `neuroscope push`; "
            f"name one that was."
        ) from error
    return commit_of(path), package.read_manifest(path, str(repository))


def _artefacts(
    repository: Repository,
    manifest: package.Manifest,
    sae: LockedSAE,
    info: SAEInfo,
    staging: Path,
) -> list[_Artefact]:
    """Everything about one SAE, checked. Errors are those of `fetch`."""
    entry = manifest.saes.get(package.key_of(sae.name))
    if entry is None or entry.sae != sae.name:
        logger.warning("%s has nothing about %s.", repository, sae.name)
        return []
    if entry.commit != sae.commit:
        logger.warning(
            "%s was made with commit %s of %s, and the SAE is pulled at %s; they may differ.",
            repository,
            entry.commit[:12],
            sae.name,
            sae.commit[:12],
        )
    found = []
    home = artefacts.home(sae.name)
    if entry.calibration is not None:
        path = package.calibration_path(sae.name)
        file = fetch_file(repository, path)
        _check_calibration(file, repository, info)
        content = file.read_bytes()
        target = home / artefacts.CALIBRATION
        found.append(_Artefact(path, _sha256(content), target, content))
    for labeller in sorted(entry.labels):
        path = package.labels_path(sae.name, labeller)
        file = fetch_file(repository, path)
        labels = package.labels_from_parquet(file, labeller, info.width, staging)
        target = artefacts.labels_file(sae.name, labeller)
        found.append(_Artefact(path, _sha256(file.read_bytes()), target, labels.to_jsonl()))
    return found


def _check_calibration(file: Path, repository: Repository, info: SAEInfo) -> None:
    from neuroscope_vllm.core.calibration import Calibration

    size, most = file.stat().st_size, MAX_CALIBRATION_BYTES_A_FEATURE * info.width + (64 << 20)
    if size > most:
        raise ConfigError(
            f"the calibration in {repository} has {size} bytes, too many for {info.width} "
            f"features; do not use it."
        )
    width = Calibration.load(file).width
    if width != info.width:
        raise ConfigError(
            f"the calibration in {repository} is of {width} features, but SAE {info.source} has "
            f"{info.width}; push one of this SAE."
        )


def _install(file: _Artefact) -> Path | None:
    """Put a file in place; where another was, keep it under a name that nothing reads."""
    old = None
    if file.target.is_file():
        there = file.target.read_bytes()
        if there == file.content:
            return None
        old = file.target.with_name(f"{file.target.name}.{_sha256(there)[:8]}.old")
        artefacts.write_whole(old, there)
    artefacts.write_whole(file.target, file.content)
    return old


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
