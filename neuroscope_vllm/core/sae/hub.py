"""SAEs on the Hugging Face hub: resolve a revision once, fetch only the files that are needed.

Uses the user's own token, cache and HF_HUB_OFFLINE, as huggingface_hub does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    constants,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neuroscope_vllm.core.errors import DownloadError, SAEError
from neuroscope_vllm.core.sae.formats import FORMATS, Format, Located

_URI = re.compile(r"hf://([^/@\s]+/[^/@\s]+)(?:@([^/\s]+))?(?:/(.*?))?/?")


class _Place(NamedTuple):
    """A folder of a hub repository at a revision."""

    source: str
    repo: str
    revision: str | None
    folder: PurePosixPath


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
    place = _parse(source, revision)
    not_cached: LocalEntryNotFoundError | None = None
    incomplete: SAEError | None = None
    for format in FORMATS.values():
        try:
            first = _download(place, format.files[0])
        except LocalEntryNotFoundError as error:  # before EntryNotFoundError, its base
            not_cached = error
            continue
        except EntryNotFoundError:
            continue
        try:
            return _fetch_rest(place, format, first), format
        except SAEError as error:  # another format may have a file of this name too
            incomplete = incomplete or error
    if incomplete is not None:
        raise incomplete
    if not_cached is not None:
        raise _not_fetched(place, not_cached) from not_cached
    return None


def list_folder(source: str, revision: str | None) -> list[str]:
    """Names of files and folders right inside the folder of a hub URI.

    Raises:
        SAEError, DownloadError: As `fetch`.
    """
    place = _parse(source, revision)
    with _hub_errors(place):
        files = HfApi().model_info(place.repo, revision=place.revision).siblings or []
    paths = [PurePosixPath(file.rfilename) for file in files]
    inside = [path.relative_to(place.folder) for path in paths if place.folder in path.parents]
    return sorted({path.parts[0] for path in inside})


def _fetch_rest(place: _Place, format: Format, first: Path) -> Located:
    """The other files, at the commit that the first came from."""
    sha = first.parts[first.parts.index("snapshots") + 1]  # the layout of the hub's cache
    pinned = place._replace(revision=sha)
    paths = {format.files[0]: first}
    for name in format.files[1:]:
        try:
            paths[name] = _download(pinned, name)
        except LocalEntryNotFoundError as error:
            raise _not_fetched(place, error) from error
        except EntryNotFoundError as error:
            raise SAEError(
                f"SAE {place.source} has {format.files[0]} but no {name}; give the folder of a "
                f"complete SAE."
            ) from error
    for name in format.optional:
        try:
            paths[name] = _download(pinned, name)
        except LocalEntryNotFoundError as error:
            cached = try_to_load_from_cache(place.repo, str(place.folder / name), revision=sha)
            if cached is not _CACHED_NO_EXIST:  # it may exist
                raise _not_fetched(place, error) from error
        except EntryNotFoundError:
            continue
    return Located(place.source, paths, sha)


def _parse(source: str, revision: str | None) -> _Place:
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
    return _Place(source, repo, in_uri or revision, folder)


def _download(place: _Place, name: str) -> Path:
    with _hub_errors(place):
        path = hf_hub_download(place.repo, str(place.folder / name), revision=place.revision)
    return Path(path)


@contextmanager
def _hub_errors(place: _Place) -> Iterator[None]:
    """The hub's errors as sentences; a missing file passes through, for the caller to judge."""
    try:
        yield
    except EntryNotFoundError:
        raise
    except GatedRepoError as error:  # before RepositoryNotFoundError, its base
        raise DownloadError(
            f"{place.repo} is gated; accept its terms on its hub page with your account, then set "
            f"HF_TOKEN or run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{place.repo} does not exist on the hub, or is private; check the name, and set "
            f"HF_TOKEN if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"{place.repo} has no revision {place.revision!r}; give one of its branches, tags or "
            f"commits."
        ) from error
    except HFValidationError as error:
        raise SAEError(
            f"SAE {place.source} names {place.repo!r}, which cannot be a repository; write "
            f"hf://org/repo/path."
        ) from error
    except HfHubHTTPError as error:
        raise DownloadError(
            f"the hub refused {place.repo} ({_one_line(error)}); check your access, or try again "
            f"later."
        ) from error


def _not_fetched(place: _Place, error: LocalEntryNotFoundError) -> DownloadError:
    offline = constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if offline else _one_line(error.__cause__ or error)
    return DownloadError(
        f"SAE {place.source} is not in the local cache and cannot be fetched ({why}); download it "
        f"once with a network, or give a local path."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
