"""Publish what was made about SAEs as a dataset repository: see `package` for what is in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from msgspec.structs import replace

from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.errors import (
    ConfigError,
    NoFileError,
    NoRepositoryError,
    NotLoggedInError,
)
from neuroscope_vllm.core.labels import LabelSet, labels_of, stored_labels
from neuroscope_vllm.core.labels.neuronpedia import is_neuronpedias
from neuroscope_vllm.core.sae.hub import is_hub_uri, parse_address
from neuroscope_vllm.core.sae.load import read_sae_info
from neuroscope_vllm.core.sharing import package
from neuroscope_vllm.core.sharing.card import render_card
from neuroscope_vllm.core.sharing.package import CalibrationEntry, Entry, LabelsEntry, Manifest
from neuroscope_vllm.core.sharing.repository import Repository, fetch_file, hub_errors, list_files

logger = logging.getLogger(__name__)


def push(
    repo: str,
    sources: Sequence[str],
    *,
    labellers: Sequence[str] = (),
    license: str | None = None,
    private: bool = False,
    message: str | None = None,
) -> str:
    """Add what is known about SAEs to a dataset repository, in one commit; make it if needed.

    What the repository has about other SAEs and by other labellers stays.

    Args:
        repo: `org/repo`.
        sources: hf:// addresses of SAEs.
        labellers: Whose labels; empty: all but Neuronpedia's.
        license: SPDX id of the licence; None: as the repository says already.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: There is nothing to push, it may not be published, a public repository would
            have no licence, or the repository holds something else.
        SAEError, DownloadError: An SAE cannot be read; or a kind of DownloadError from the hub.
    """
    if get_token() is None:
        raise NotLoggedInError(
            f"pushing to {repo} needs an account on the hub; run `hf auth login`, or set HF_TOKEN."
        )
    entries: dict[str, Entry] = {}
    files: dict[str, bytes | Path] = {}
    for source in sources:
        entry, found = _collect(source, labellers)
        entries[package.key_of(entry.sae)] = entry
        files |= found
    there = _what_is_there(repo, private)
    license = license or there.manifest.license
    if license is None and not private:
        raise ConfigError(
            f"dataset {repo} would be public without a licence, and nobody could use it; give one "
            f"with --license (such as cc-by-4.0), or keep it --private."
        )
    manifest = _merged(there.manifest, entries, license)
    files |= {
        package.MANIFEST: manifest.encode(),
        package.CARD: render_card(repo, manifest).encode(),
    }
    names = ", ".join(entry.sae for entry in entries.values())
    with hub_errors(Repository(repo, "dataset")):
        if there.head is None:
            HfApi().create_repo(repo, repo_type="dataset", private=private or None)
        commit = HfApi().create_commit(
            repo,
            [CommitOperationAdd(path, content) for path, content in sorted(files.items())],
            commit_message=message or f"Add what is known about {names}",
            repo_type="dataset",
            parent_commit=there.head,
        )
    return commit.commit_url


class _There(NamedTuple):
    """A repository as it stands: its manifest and newest commit; None if it does not exist yet."""

    manifest: Manifest
    head: str | None


def _collect(source: str, labellers: Sequence[str]) -> tuple[Entry, dict[str, bytes | Path]]:
    """The entry of an SAE, and its files by their paths in the repository."""
    if not is_hub_uri(source):
        raise ConfigError(
            f"sae {source} is on this machine only, and who pulls could not tell which it is; "
            f"upload it to the hub and give its hf:// address."
        )
    info = read_sae_info(source)
    assert info.revision is not None  # every SAE on the hub has a commit
    name = parse_address(source).at(None)
    files: dict[str, bytes | Path] = {}
    measured = None
    if (path := artefacts.find_calibration(name)) is not None:
        calibration = Calibration.load(path)
        if calibration.width != info.width:
            raise ConfigError(
                f"calibration {path} is of {calibration.width} features, but SAE {name} has "
                f"{info.width}; calibrate again with this SAE."
            )
        measured = CalibrationEntry(
            tokens=calibration.tokens, corpus=calibration.corpus, created=calibration.created
        )
        files[package.calibration_path(name)] = path
    published = {}
    for labels in _chosen(name, labellers):
        highest = max(label.index for label in labels)
        if highest >= info.width:
            raise ConfigError(
                f"labels by {labels.labeller} are of feature {highest} too, but SAE {name} has "
                f"{info.width}; label again with this SAE."
            )
        about = labels.summary()
        published[labels.labeller] = LabelsEntry(
            count=about.labels, methods=about.methods, models=about.models
        )
        files[package.labels_path(name, labels.labeller)] = package.labels_to_parquet(labels)
    if not files:
        raise ConfigError(
            f"there is nothing to push about SAE {name}: no calibration and no labels in "
            f"{artefacts.home(name)}; make some with `neuroscope calibrate` and "
            f"`neuroscope labels import`."
        )
    entry = Entry(
        sae=name,
        commit=info.revision,
        width=info.width,
        layer=info.layer,
        model=info.model_name,
        calibration=measured,
        labels=published,
    )
    return entry, files


def _chosen(name: str, labellers: Sequence[str]) -> list[LabelSet]:
    """Labels of an SAE that are to be published, and may be."""
    if labellers:
        chosen = [labels_of(name, labeller)[1] for labeller in dict.fromkeys(labellers)]
    else:
        chosen = list(stored_labels(name).values())
    theirs = [labels.labeller for labels in chosen if is_neuronpedias(labels)]
    if theirs and labellers:
        raise ConfigError(
            f"labels by {theirs[0]} are Neuronpedia's and are not pushed, as it states no licence "
            f"under which others may publish them; who wants them runs `neuroscope labels import "
            f"neuronpedia`."
        )
    for labeller in theirs:
        logger.warning(
            "labels by %s stay here: they are Neuronpedia's, which states no licence.", labeller
        )
    return [labels for labels in chosen if labels.labeller not in theirs]


def _what_is_there(repo: str, private: bool) -> _There:
    """Raises ConfigError if the repository is used for something else, or is not as private."""
    repository = Repository(repo, "dataset")
    try:
        with hub_errors(repository):
            info = HfApi().dataset_info(repo)
    except NoRepositoryError:
        return _There(Manifest(), None)
    if private and not info.private:
        raise ConfigError(
            f"dataset {repo} exists and is public; make it private on its page, or leave --private "
            f"out."
        )
    assert info.sha is not None  # the hub always says
    repository = repository.at(info.sha)
    try:
        return _There(
            package.read_manifest(fetch_file(repository, package.MANIFEST), repo), info.sha
        )
    except NoFileError:
        others = set(list_files(repository)) - {".gitattributes", package.CARD}
    if others:
        raise ConfigError(
            f"dataset {repo} holds something else ({', '.join(sorted(others)[:3])}); push to a new "
            f"repository."
        )
    return _There(Manifest(), info.sha)


def _merged(there: Manifest, entries: dict[str, Entry], license: str | None) -> Manifest:
    """Entries over those of the repository, of which labellers that are not pushed now stay."""
    saes = dict(there.saes)
    for key, entry in entries.items():
        if (old := saes.get(key)) is not None:
            entry = replace(
                entry,
                calibration=entry.calibration or old.calibration,
                labels={**old.labels, **entry.labels},
            )
        saes[key] = entry
    return Manifest(license=license, saes=saes)
