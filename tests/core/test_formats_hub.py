"""The formats of several files on the hub: which are fetched, and from where in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from neuroscope_vllm.core.errors import NeuroscopeError
from neuroscope_vllm.core.sae import load_sae, read_sae_info
from tests.core import test_formats_gemma_scope_2 as gemma_scope_2
from tests.core import test_formats_sparsify as sparsify
from tests.core.test_formats_llama_scope import folder as llama_scope  # noqa: F401  (a fixture)
from tests.core.test_hub import REPO
from tests.support.hf_hub import HubServer, hub  # noqa: F401  (a fixture)


def upload(hub: HubServer, folder: Path, to: str) -> str:  # noqa: F811
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {f"{to}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in paths}
    return hub.add_repo(REPO, files)


@pytest.mark.parametrize("path", ["", "/checkpoints/final.safetensors", "/hyperparams.json"])
def test_a_format_with_a_folder_of_its_own(hub: HubServer, llama_scope: Path, path: str) -> None:  # noqa: F811
    commit = upload(hub, llama_scope, "L24R-8x")
    info = load_sae(f"hf://{REPO}/L24R-8x{path}").info
    assert (info.format, info.layer, info.revision) == ("llama-scope", 24, commit)


def test_formats_that_share_a_name_are_told_apart(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    sparsify.write(tmp_path / "sae")
    commit = upload(hub, tmp_path / "sae", "layers.10")
    info = load_sae(f"hf://{REPO}/layers.10").info
    assert (info.format, info.layer, info.revision) == ("sparsify", 10, commit)


@pytest.mark.parametrize("configured", [True, False])
def test_a_file_that_may_be_missing(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    configured: bool,
) -> None:
    config = {"hf_hook_point_in": "model.layers.9.output"} if configured else {}
    upload(
        hub, gemma_scope_2.write(tmp_path / "sae", **config), "resid_post/layer_17_width_16k_l0_big"
    )
    source = f"hf://{REPO}/resid_post/layer_17_width_16k_l0_big"
    layer = 9 if configured else 17
    assert read_sae_info(source).layer == layer
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_sae(source).info.layer == layer


def test_a_revision_that_leads_out_is_refused(hub: HubServer) -> None:  # noqa: F811
    for uri in (f"hf://{REPO}@../x", f"hf://{REPO}/a/../../x", "hf://../x/y"):
        with pytest.raises(NeuroscopeError):
            load_sae(uri)
