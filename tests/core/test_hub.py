"""SAEs on the hub, through huggingface_hub's real client, against a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from neuroscope_vllm.core.errors import (
    ConfigError,
    DownloadError,
    GatedError,
    NoFileError,
    NoRepositoryError,
    NoRevisionError,
    NotAllowedError,
    NotLoggedInError,
    SAEError,
    UnreachableError,
)
from neuroscope_vllm.core.sae import load_sae, read_sae_info
from tests.support.hf_hub import HubServer, hub  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # SAELens' own imports
    pytest.mark.usefixtures("hub"),
]

REPO = "google/gemma-scope-2b-pt-res"
FOLDER = "layer_20/width_16k/average_l0_71"


@pytest.fixture
def params(tmp_path: Path) -> bytes:
    """A Gemma Scope file of d_model 4 and width 8."""
    draw = np.random.default_rng(0)
    shapes = {"W_enc": (4, 8), "W_dec": (8, 4), "b_enc": 8, "b_dec": 4, "threshold": 8}
    arrays = {name: draw.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "made.npz", **arrays)
    return (tmp_path / "made.npz").read_bytes()


@pytest.mark.parametrize("path", [FOLDER, f"{FOLDER}/", f"{FOLDER}/params.npz"])
def test_a_gemma_scope_folder_resolves_to_its_file_and_a_commit(
    hub: HubServer,  # noqa: F811
    params: bytes,
    path: str,
) -> None:
    commit = hub.add_repo(REPO, {f"{FOLDER}/params.npz": params, "README.md": b"much else"})
    sae = load_sae(f"hf://{REPO}/{path}")
    assert (sae.info.revision, sae.info.layer, sae.width) == (commit, 20, 8)
    assert sae.info.neuronpedia_id == "gemma-2-2b/20-gemmascope-res-16k"
    assert hub.downloads() == [f"{FOLDER}/params.npz"]


def test_a_revision_may_be_in_the_address_or_beside_it(hub: HubServer, params: bytes) -> None:  # noqa: F811
    old = {f"{FOLDER}/params.npz": params}
    hub.add_repo(REPO, {"README.md": b""}, revision_branches={"v1": old})
    tagged = hub.repos["model", REPO].refs["v1"]
    assert read_sae_info(f"hf://{REPO}@v1/{FOLDER}").revision == tagged
    assert read_sae_info(f"hf://{REPO}/{FOLDER}", revision="v1").revision == tagged
    with pytest.raises(SAEError, match="names revision 'v1' but revision 'v2' was given too"):
        read_sae_info(f"hf://{REPO}@v1/{FOLDER}", revision="v2")


def test_the_files_of_one_sae_come_from_one_commit(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    from sae_lens import StandardSAE, StandardSAEConfig

    weights, config = StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)).save_model(tmp_path / "sae")
    files = {"sae/cfg.json": config.read_bytes(), f"sae/{weights.name}": weights.read_bytes()}
    commit = hub.add_repo(REPO, files)
    info = read_sae_info(f"hf://{REPO}/sae")
    assert (info.format, info.revision, info.width) == ("saelens", commit, 8)
    asked = [request.path for request in hub.requests]
    assert f"/{REPO}/resolve/{commit}/sae/{weights.name}" in asked


def test_offline_the_cache_serves_and_what_is_not_there_is_said(
    hub: HubServer,  # noqa: F811
    params: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = hub.add_repo(REPO, {f"{FOLDER}/params.npz": params})
    load_sae(f"hf://{REPO}/{FOLDER}")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_sae(f"hf://{REPO}/{FOLDER}").info.revision == commit
    with pytest.raises(UnreachableError, match=r"not in the local cache .*HF_HUB_OFFLINE is set"):
        load_sae(f"hf://{REPO}/layer_19/width_16k/average_l0_73")
    assert hub.requests == []


def test_while_the_hub_is_down_the_cache_serves(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    weights, config = StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)).save_model(tmp_path / "sae")
    files = {"cfg.json": config.read_bytes(), weights.name: weights.read_bytes()}
    hub.add_repo(REPO, files)
    load_sae(f"hf://{REPO}")
    hub.status_of_all = 403
    assert load_sae(f"hf://{REPO}").width == 8


@pytest.mark.parametrize(
    ("uri", "kind", "says"),
    [
        ("hf://org/gated/x", GatedError, "org/gated is gated; accept its terms .* set HF_TOKEN"),
        ("hf://org/absent/x", NoRepositoryError, "org/absent does not exist on the hub, or is p"),
        ("hf://org/private/x", NoRepositoryError, "org/private does not exist on the hub, or is"),
        (f"hf://{REPO}@v9/{FOLDER}", NoRevisionError, "has no revision 'v9'; give one of its br"),
    ],
)
@pytest.mark.parametrize("token", ["", "hf_bob"])
def test_what_the_hub_refuses_is_a_sentence(
    hub: HubServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    uri: str,
    kind: type[DownloadError],
    says: str,
) -> None:
    hub.add_user("bob")
    hub.add_repo(REPO, {"README.md": b""})
    hub.add_repo("org/gated", {"x/params.npz": b""}, gated=True)
    hub.add_repo("org/private", {"x/params.npz": b""}, private=True)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(kind, match=says):
        load_sae(uri)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (400, DownloadError, f"the hub refused {REPO} .*the hub is down.*; check your access"),
        (403, NotAllowedError, "does not let you do that in"),
        (404, DownloadError, "the hub refused"),
    ],
)
def test_a_hub_in_trouble_is_a_sentence(
    hub: HubServer,  # noqa: F811
    status: int,
    kind: type[DownloadError],
    says: str,
) -> None:
    hub.status_of_all = status
    with pytest.raises(DownloadError, match=says) as caught:
        load_sae(f"hf://{REPO}")
    assert type(caught.value) is kind


def test_a_token_that_is_not_valid_is_said(
    hub: HubServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add_repo(REPO, {"params.npz": b""})
    monkeypatch.setenv("HF_TOKEN", "hf_stolen")
    with pytest.raises(NotLoggedInError, match="does not accept your token"):
        load_sae(f"hf://{REPO}")


def test_a_listing_that_leads_out_is_refused(hub: HubServer) -> None:  # noqa: F811
    hub.add_repo(REPO, {"../../evil": b"x"})
    with pytest.raises(DownloadError, match="which leads out of it"):
        load_sae(f"hf://{REPO}/nowhere")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("hf://gpt2", "not a hub address; write hf://org/repo/path"),
        ("hf://org/--bad--/x", "'org/--bad--' cannot be a repository"),
        (f"hf://{REPO}/../x", "leads out of its repository"),
        (f"hf://{REPO}/layer_20", "it holds a.txt, width_16k; give a folder with params.npz"),
        (f"hf://{REPO}/old", r"is a pickle \(sae.pt\), and pickles can run code"),
        (f"hf://{REPO}/half", "has cfg.json but no sae_weights.safetensors"),
    ],
)
def test_an_address_without_an_sae_is_refused(hub: HubServer, uri: str, says: str) -> None:  # noqa: F811
    names = ("layer_20/a.txt", f"{FOLDER}/params.npz", "old/sae.pt", "half/cfg.json")
    hub.add_repo(REPO, dict.fromkeys(names, b"{}"))
    with pytest.raises((SAEError, ConfigError), match=says):
        load_sae(uri)


def test_a_folder_that_the_repository_has_not_is_a_missing_file(hub: HubServer) -> None:  # noqa: F811
    hub.add_repo(REPO, {f"{FOLDER}/params.npz": b"{}"})
    with pytest.raises(NoFileError, match=f"{REPO} has no folder layer_99/x; give the folder"):
        load_sae(f"hf://{REPO}/layer_99/x")


def test_gemma_scope_by_name_through_the_variables_alone(
    hub: HubServer,  # noqa: F811
    params: bytes,
    tmp_path: Path,
) -> None:
    commit = hub.add_repo(REPO, {f"{FOLDER}/params.npz": params})
    code = (
        "import json; from neuroscope_vllm.core.sae import canonical_source, load_sae; "
        "info = load_sae(canonical_source('google/gemma-2-2b-it', 20)).info; "
        "print(json.dumps([info.layer, info.width, info.revision]))"
    )
    env = os.environ | hub.environ(tmp_path / "other")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert json.loads(done.stdout) == [20, 8, commit]
