"""SAEs on the Hugging Face hub: resolve a revision once, fetch only the files that are needed."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

from neuroscope_vllm.core.errors import DownloadError, NoFileError, SAEError
from neuroscope_vllm.core.sae.formats import FORMATS, Format, Located
from neuroscope_vllm.core.sharing.repository import Repository, commit_of, fetch_file, list_files

_URI = re.compile(r"hf://([^/@\s]+/[^/@\s]+)(?:@([^/\s]+))?(?:/(.*?))?/?")


class HubAddress(NamedTuple):
    """A folder of a hub repository at a revision."""

    source: str
    repo: str
    revision: str | None
    folder: PurePosixPath

    @property
    def repository(self) -> Repository:
        return Repository(self.repo, "model", self.revision, f"SAE {self.source}")

    @property
    def path(self) -> str:
        """The folder; empty for the repository's own."""
        return "" if self.folder == PurePosixPath() else str(self.folder)

    def at(self, commit: str | None) -> str:
        """The address of the same SAE at a commit, or at none."""
        where = f"{self.repo}@{commit}" if commit else self.repo
        return f"hf://{where}/{self.path}".rstrip("/")


def is_hub_uri(source: str) -> bool:
    return source.startswith("hf://")


def fetch(source: str, revision: str | None) -> tuple[Located, Format] | None:
    """Download the files of the SAE at a hub URI; None if there is no SAE of a known format.

    Args:
        source: `hf://org/repo[@revision]/path/inside`; the path is a folder, or a format's file.
        revision: Branch, tag or commit, when it is not in the URI.

    Raises:
        SAEError: The URI is malformed, or the SAE there is incomplete.
        DownloadError: No access, no such repository or revision, or neither a network nor a
            cached copy.
    """
    address = parse_address(source, revision)
    refused: DownloadError | None = None
    incomplete: SAEError | None = None
    for format in FORMATS.values():
        try:
            first = _download(address, format.files[0], cached=refused is not None)
        except NoFileError:
            continue
        except DownloadError as error:  # the file of another format may be in the cache
            refused = refused or error
            continue
        try:
            return _fetch_rest(address, format, first), format
        except SAEError as error:  # another format may have a file of this name too
            incomplete = incomplete or error
    if incomplete is not None:
        raise incomplete
    if refused is not None:
        raise refused
    return None


def list_folder(source: str, revision: str | None) -> list[str]:
    """Names of files and folders right inside the folder of a hub URI.

    Raises:
        SAEError, DownloadError: As `fetch`; NoFileError if there is no such folder.
    """
    address = parse_address(source, revision)
    paths = map(PurePosixPath, list_files(address.repository))
    inside = [path.relative_to(address.folder) for path in paths if address.folder in path.parents]
    if not inside:
        raise NoFileError(
            f"{source} is not an SAE: {address.repo} has no folder {address.path or 'with files'}; "
            f"give the folder of one, as the repository's page shows it."
        )
    return sorted({path.parts[0] for path in inside})


def _fetch_rest(address: HubAddress, format: Format, first: Path) -> Located:
    """The other files, at the commit that the first came from."""
    commit = commit_of(first)
    pinned = address._replace(revision=commit)
    paths = {format.files[0]: first}
    for name in format.files[1:]:
        try:
            paths[name] = _download(pinned, name)
        except NoFileError as error:
            raise SAEError(
                f"SAE {address.source} has {format.files[0]} but no {name}; give the folder of a "
                f"complete SAE."
            ) from error
    for name in format.optional:
        try:
            paths[name] = _download(pinned, name)
        except NoFileError:
            continue
        except DownloadError:
            path = str(address.folder / name)
            cached = try_to_load_from_cache(address.repo, path, revision=commit)
            if cached is not _CACHED_NO_EXIST:  # it may exist
                raise
    return Located(address.source, paths, commit)


def parse_address(source: str, revision: str | None = None) -> HubAddress:
    """Raises SAEError for what is not an address, or leads out of its repository."""
    match = _URI.fullmatch(source)
    if match is None:
        raise SAEError(
            f"{source} is not a hub address; write hf://org/repo/path or "
            f"hf://org/repo@revision/path."
        )
    repo, in_uri, path = match[1], match[2], match[3] or ""
    if in_uri and revision and in_uri != revision:
        raise SAEError(
            f"SAE {source} names revision {in_uri!r} but revision {revision!r} was given too; give "
            f"one of them."
        )
    folder = PurePosixPath(path)
    if ".." in folder.parts:
        raise SAEError(f"SAE {source} leads out of its repository; leave '..' out.")
    for name in (PurePosixPath(n) for format in FORMATS.values() for n in format.all_files):
        if name.name == folder.name and len(name.parts) <= len(folder.parts):
            folder = folder.parents[len(name.parts) - 1]
            break
    return HubAddress(source, repo, in_uri or revision, folder)


def _download(address: HubAddress, name: str, *, cached: bool = False) -> Path:
    return fetch_file(address.repository, str(address.folder / name), cached=cached)
