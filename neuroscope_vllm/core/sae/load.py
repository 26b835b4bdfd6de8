"""From what the user typed to an SAE: find its files, on disk or on the hub, and its format."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.formats import FORMATS, Format, Located, load_tensors
from neuroscope_vllm.core.sae.hub import fetch, is_hub_uri, list_folder
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.sae import SAE

PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
MAX_NAMES_SHOWN = 8


def load_sae(path_or_uri: str | Path, *, revision: str | None = None) -> SAE:
    """Load an SAE on the CPU, in float32.

    Args:
        path_or_uri: A folder or file, or `hf://org/repo[@revision]/path/inside`, for example
            `hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`.
        revision: Branch, tag or commit on the hub, when it is not in the URI.

    Raises:
        SAEError: The files are missing, unreadable, malformed or of a kind that is not served.
        DownloadError: The hub did not give the files.
    """
    found, format = _locate(str(path_or_uri), revision)
    return load_tensors(found, format)


def read_sae_info(path_or_uri: str | Path, *, revision: str | None = None) -> SAEInfo:
    """What an SAE is, from its headers alone: no tensor is read, nor its values checked.

    A hub SAE that is not cached is downloaded first. Arguments and errors are those of `load_sae`.
    """
    found, format = _locate(str(path_or_uri), revision)
    return format.read_info(found).info


def _locate(source: str, revision: str | None) -> tuple[Located, Format]:
    if _is_refused_pickle(source):
        raise _pickle_error(source, Path(source).name)
    if is_hub_uri(source):
        fetched = fetch(source, revision)
        if fetched is None:
            raise _not_an_sae(source, list_folder(source, revision))
        return fetched
    if revision is not None:
        raise SAEError(
            f"revision {revision!r} was given for {source}, which is a local path; leave it out."
        )
    return _locate_local(source)


def _locate_local(source: str) -> tuple[Located, Format]:
    try:
        return _locate_path(source, Path(source).expanduser())
    except (OSError, RuntimeError) as error:  # no right to look, a name too long, ~nobody
        raise SAEError(
            f"SAE {source} cannot be looked at ({error}); give a folder or file that you can read."
        ) from error


def _locate_path(source: str, path: Path) -> tuple[Located, Format]:
    if not path.exists():
        raise SAEError(
            f"SAE {source} does not exist; give a folder, a file, or hf://org/repo/path/inside."
        )
    if path.suffix.lower() == ".npz" and path.is_file():  # may have been renamed
        return Located(source, {"params.npz": path}, None), FORMATS["gemma-scope"]
    if path.is_file():
        known = [PurePosixPath(name) for format in FORMATS.values() for name in format.all_files]
        match = next((name for name in known if name.name == path.name), None)
        if match is None:
            raise _not_an_sae(source, [path.name])
        path = path.parents[len(match.parts) - 1]
    for format in FORMATS.values():
        if all((path / name).is_file() for name in format.files):
            paths = {name: path / name for name in format.all_files if (path / name).is_file()}
            return Located(source, paths, None), format
    raise _not_an_sae(source, [child.name for child in path.iterdir()])


def _is_refused_pickle(name: str) -> bool:
    """Whether a file is a pickle, other than the one that a format reads as weights only."""
    path = Path(name)
    known = any(path.name in format.files for format in FORMATS.values())
    return path.suffix.lower() in PICKLES and not known


def _not_an_sae(source: str, names: list[str]) -> SAEError:
    """The error for a folder whose files no format has."""
    for name in names:
        if _is_refused_pickle(name):
            return _pickle_error(source, name)
    shown = sorted(names)[:MAX_NAMES_SHOWN] + ["…"] * (len(names) > MAX_NAMES_SHOWN)
    accepted = " or ".join(
        f"{' + '.join(format.files)} ({name})" for name, format in FORMATS.items()
    )
    return SAEError(
        f"{source} is not an SAE: it holds {', '.join(shown) or 'nothing'}; give a folder with "
        f"{accepted}."
    )


def _pickle_error(source: str, name: str) -> SAEError:
    return SAEError(
        f"SAE {source} is a pickle ({name}), and pickles can run code when opened; convert it with "
        f"SAELens' save_model and give that folder."
    )
