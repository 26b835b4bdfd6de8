"""Repositories on the Hugging Face hub: fetch files, list them, and say in a sentence why not.

Uses the user's own token, cache, HF_ENDPOINT and HF_HUB_OFFLINE, as huggingface_hub does.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neuroscope_vllm.core.errors import (
    ConfigError,
    DiskFullError,
    DownloadError,
    GatedError,
    NeuroscopeError,
    NoFileError,
    NoRepositoryError,
    NoRevisionError,
    NotAllowedError,
    NotLoggedInError,
    UnreachableError,
)

# What the hub's HTTP client raises: httpx.HTTPError, or httpx2's since huggingface_hub 2.
_HTTPError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
_DOWN = frozenset({408, 429, 500, 502, 503, 504})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Repository(NamedTuple):
    """A repository at a revision; `what` it is to the user, when not its name."""

    name: str
    type: str = "model"
    revision: str | None = None
    what: str | None = None

    def at(self, commit: str) -> Repository:
        return self._replace(revision=commit)

    def __str__(self) -> str:
        return self.what or (f"dataset {self.name}" if self.type == "dataset" else self.name)


def fetch_file(repository: Repository, path: str, *, cached: bool = False) -> Path:
    """The cached file, downloaded first if it is not there, unless only the cache is to be asked.

    Raises:
        NoFileError: The repository has no such file.
        DownloadError: As `hub_errors`.
    """
    check_name(repository, path)
    with hub_errors(repository, path):
        return Path(
            hf_hub_download(
                repository.name,
                path,
                repo_type=repository.type,
                revision=repository.revision,
                local_files_only=cached,
            )
        )


def commit_of(path: Path) -> str:
    """The commit that a cached file, as `fetch_file` returns it, belongs to."""
    return path.parts[path.parts.index("snapshots") + 1]  # the layout of the hub's cache


def list_files(repository: Repository) -> list[str]:
    """Paths of all files in the repository.

    Raises:
        DownloadError: As `hub_errors`, also where the cache has some of it; or a path leads out.
    """
    with hub_errors(repository):
        paths = HfApi().list_repo_files(
            repository.name, repo_type=repository.type, revision=repository.revision
        )
    for path in paths:
        check_name(repository, path)
    return paths


def check_name(repository: Repository, path: str) -> None:
    """Raise DownloadError for a path that would not lie inside the repository's folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise DownloadError(
            f"{repository} has a file named {path!r}, which leads out of it; do not use it."
        )


@contextmanager
def hub_errors(repository: Repository, path: str | None = None) -> Iterator[None]:
    """Everything that huggingface_hub raises, as one of our errors.

    Raises:
        DownloadError: One of its kinds.
        ConfigError: The name cannot be a repository.
    """
    try:
        yield
    except NeuroscopeError:
        raise
    except Exception as error:  # of many libraries and kinds: HTTP, files, xet's runtime
        raise _translated(error, repository, path) from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What goes wrong when we write files ourselves, as DiskFullError or ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(folder, error) from error
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror or error}); choose another place."
        ) from error


def _translated(error: Exception, repository: Repository, path: str | None) -> NeuroscopeError:
    if _is_disk_full(error):
        return _disk_full(Path(constants.HF_HUB_CACHE), error)
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        inner = error.__cause__
        if isinstance(inner, HfHubHTTPError):  # the hub did answer
            return _refused(inner, repository, path)
        return _unreachable(inner, repository, path)
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repository, path)
    if isinstance(error, HFValidationError):
        return ConfigError(
            f"{repository.name!r} cannot be a repository; write org/repo, as its page does."
        )
    if isinstance(error, LocalTokenNotFoundError):
        return NotLoggedInError(
            "you are not logged in to the hub; run `hf auth login`, or set HF_TOKEN."
        )
    if isinstance(error, _HTTPError | FileMetadataError | EntryNotFoundError | ConnectionError):
        return _unreachable(error, repository, path)
    if isinstance(error, ValueError):
        return DownloadError(
            f"the hub does not take what was sent to {repository} ({_one_line(error)}); correct it."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return DownloadError(
            f"{repository} cannot be stored ({error}); check the folder {constants.HF_HUB_CACHE}, "
            f"or set HF_HOME to another."
        )
    return DownloadError(
        f"{repository} could not be transferred ({_one_line(error)}); try again, which continues "
        f"with what is missing."
    )


def _refused(error: HfHubHTTPError, repository: Repository, path: str | None) -> NeuroscopeError:
    """The hub's own refusals."""
    status = error.response.status_code
    said = _one_line(error)
    if isinstance(error, EntryNotFoundError):
        return NoFileError(
            f"{repository} has no file {path}; check the path, and the revision if you gave one."
        )
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, its base
        return GatedError(
            f"{repository.name} is gated; accept its terms on its hub page with your account, then "
            f"set HF_TOKEN or run `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        kind = "dataset " if repository.type == "dataset" else ""
        return NoRepositoryError(
            f"{kind}{repository.name} does not exist on the hub, or is private; check the name, "
            f"and set HF_TOKEN if it is private."
        )
    if isinstance(error, RevisionNotFoundError):
        return NoRevisionError(
            f"{repository.name} has no revision {repository.revision!r}; give one of its branches, "
            f"tags or commits."
        )
    if status == 401:
        return NotLoggedInError(
            f"the hub does not accept your token ({said}); run `hf auth login` again, or correct "
            f"HF_TOKEN."
        )
    if status == 403:
        return NotAllowedError(
            f"the hub does not let you do that in {repository.name} ({said}); use an account and a "
            f"token that may, with write access to push."
        )
    if status in _DOWN:
        return _unreachable(error, repository, path)
    return DownloadError(
        f"the hub refused {repository.name} ({said}); check your access, or try again later."
    )


def _unreachable(
    error: BaseException, repository: Repository, path: str | None
) -> UnreachableError:
    offline = constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else _one_line(error) or type(error).__name__
    if path is None:
        return UnreachableError(
            f"the hub cannot be asked about {repository} ({why}); run it again with a network."
        )
    return UnreachableError(
        f"{repository} is not in the local cache and cannot be fetched ({why}); fetch it once with "
        f"a network (`neuroscope pull`), or give a local path."
    )


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if "No space left on device" in str(error):  # from xet, which is written in Rust
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(folder: Path, error: BaseException) -> DiskFullError:
    return DiskFullError(
        f"there is no room left in {folder} ({_one_line(error)}); free some, or set HF_HOME and "
        f"NEUROSCOPE_DATA to a larger disk, and run it again."
    )


def _one_line(error: BaseException) -> str:
    text = error.server_message if isinstance(error, HfHubHTTPError) else None
    return " ".join((text or str(error)).split()).rstrip(".")
