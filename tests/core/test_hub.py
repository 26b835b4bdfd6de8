"""SAEs on the hub, through huggingface_hub's real client, against a small hub on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from neuroscope_vllm.core.errors import DownloadError, SAEError
from neuroscope_vllm.core.sae import load_sae, read_sae_info

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SAELens' own imports

SHA = "b" * 40
REPO = "google/gemma-scope-2b-pt-res"
FOLDER = "layer_20/width_16k/average_l0_71"


class Hub:
    """What the fake hub serves and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # by path in REPO at SHA
        self.revisions = {"main", "v1", SHA}
        self.lists = True
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one request, as the real hub answers."""
        self.asked.append(path)
        if path.startswith(f"/api/models/{REPO}"):
            if not self.lists:
                return 403, {}, b""
            listing = {"id": REPO, "sha": SHA, "siblings": [{"rfilename": n} for n in self.files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        if path.startswith("/api/"):
            return 404, {}, b""  # what else the client likes to know
        owner, name, _, revision, *parts = path.strip("/").split("/")
        if (error := self.refusal(f"{owner}/{name}", revision, "/".join(parts))) is not None:
            commit = {"X-Repo-Commit": SHA} if error[1] == "EntryNotFound" else {}
            return error[0], {"X-Error-Code": error[1], "X-Error-Message": error[1]} | commit, b""
        body = self.files["/".join(parts)]
        etag = hashlib.sha256(body).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA}, body

    def refusal(self, repo: str, revision: str, file: str) -> tuple[int, str] | None:
        if repo == "org/gated":
            return 403, "GatedRepo"
        if repo == "org/broken":
            return 400, "Other"
        if repo != REPO:
            return 404, "RepoNotFound"
        if revision not in self.revisions:
            return 404, "RevisionNotFound"
        return None if file in self.files else (404, "EntryNotFound")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.reply(with_body=False)

        def do_GET(self) -> None:
            self.reply(with_body=True)

        def reply(self, with_body: bool) -> None:
            status, headers, body = state.answer(self.path.split("?")[0])
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield state
    server.shutdown()
    server.server_close()


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
    hub: Hub, params: bytes, path: str
) -> None:
    hub.files = {f"{FOLDER}/params.npz": params, "README.md": b"much else"}
    sae = load_sae(f"hf://{REPO}/{path}")
    assert (sae.info.revision, sae.info.layer, sae.width) == (SHA, 20, 8)
    assert sae.info.neuronpedia_id == "gemma-2-2b/20-gemmascope-res-16k"
    files = {asked.split("/resolve/")[1] for asked in hub.asked if "/resolve/" in asked}
    assert files == {f"main/{FOLDER}/params.npz"}


def test_a_revision_may_be_in_the_address_or_beside_it(hub: Hub, params: bytes) -> None:
    hub.files = {f"{FOLDER}/params.npz": params}
    assert read_sae_info(f"hf://{REPO}@v1/{FOLDER}").revision == SHA
    assert read_sae_info(f"hf://{REPO}/{FOLDER}", revision="v1").revision == SHA
    assert all("/resolve/v1/" in asked for asked in hub.asked if "/resolve/" in asked)
    with pytest.raises(SAEError, match="names revision 'v1' but revision 'v2' was given too"):
        read_sae_info(f"hf://{REPO}@v1/{FOLDER}", revision="v2")


def test_the_files_of_one_sae_come_from_one_commit(hub: Hub, tmp_path: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    weights, config = StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)).save_model(tmp_path / "sae")
    hub.files = {"sae/cfg.json": config.read_bytes(), f"sae/{weights.name}": weights.read_bytes()}
    info = read_sae_info(f"hf://{REPO}/sae")
    assert (info.format, info.revision, info.width) == ("saelens", SHA, 8)
    assert f"/{REPO}/resolve/{SHA}/sae/{weights.name}" in hub.asked


def test_offline_the_cache_serves_and_what_is_not_there_is_said(
    hub: Hub, params: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {f"{FOLDER}/params.npz": params}
    load_sae(f"hf://{REPO}/{FOLDER}")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_sae(f"hf://{REPO}/{FOLDER}").info.revision == SHA
    with pytest.raises(DownloadError, match=r"not in the local cache .*\(HF_HUB_OFFLINE is set\)"):
        load_sae(f"hf://{REPO}/layer_19/width_16k/average_l0_73")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("hf://org/gated/x", "org/gated is gated; accept its terms .* set HF_TOKEN"),
        ("hf://org/absent/x", "org/absent does not exist on the hub, or is private"),
        (f"hf://{REPO}@v9/{FOLDER}", "has no revision 'v9'; give one of its branches"),
        (
            "hf://org/broken/x",
            "cannot be fetched .Bad request: Other.; download it once with a network",
        ),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(hub: Hub, uri: str, says: str) -> None:
    with pytest.raises(DownloadError, match=says):
        load_sae(uri)


def test_a_listing_that_fails_is_a_sentence(hub: Hub) -> None:
    hub.lists = False
    with pytest.raises(DownloadError, match=f"the hub refused {REPO} .*; check your access"):
        load_sae(f"hf://{REPO}/nowhere")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("hf://gpt2", "not a hub address; write hf://org/repo/path"),
        ("hf://org/--bad--/x", "names 'org/--bad--', which cannot be a repository"),
        (f"hf://{REPO}/../x", "leads out of its repository"),
        (f"hf://{REPO}/layer_20", "it holds a.txt, width_16k; give a folder with params.npz"),
        (f"hf://{REPO}/nowhere", "it holds nothing; give a folder with"),
        (f"hf://{REPO}/old", r"is a pickle \(sae.pt\), and pickles can run code"),
        (f"hf://{REPO}/half", "has cfg.json but no sae_weights.safetensors"),
    ],
)
def test_an_address_without_an_sae_is_refused(hub: Hub, uri: str, says: str) -> None:
    names = ("layer_20/a.txt", f"{FOLDER}/params.npz", "old/sae.pt", "half/cfg.json")
    hub.files = dict.fromkeys(names, b"{}")
    with pytest.raises(SAEError, match=says):
        load_sae(uri)
