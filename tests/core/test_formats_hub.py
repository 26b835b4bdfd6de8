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
from tests.core.test_hub import REPO, SHA, Hub, hub  # noqa: F401  (a fixture)


def upload(hub: Hub, folder: Path, to: str) -> None:  # noqa: F811
    for path in folder.rglob("*"):
        if path.is_file() and "cache" not in path.parts:
            hub.files[f"{to}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


@pytest.mark.parametrize("path", ["", "/checkpoints/final.safetensors", "/hyperparams.json"])
def test_a_format_with_a_folder_of_its_own(hub: Hub, llama_scope: Path, path: str) -> None:  # noqa: F811
    upload(hub, llama_scope, "L24R-8x")
    info = load_sae(f"hf://{REPO}/L24R-8x{path}").info
    assert (info.format, info.layer, info.revision) == ("llama-scope", 24, SHA)


def test_formats_that_share_a_name_are_told_apart(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    sparsify.write(tmp_path / "sae")
    upload(hub, tmp_path / "sae", "layers.10")
    info = load_sae(f"hf://{REPO}/layers.10").info
    assert (info.format, info.layer, info.revision) == ("sparsify", 10, SHA)


@pytest.mark.parametrize("configured", [True, False])
def test_a_file_that_may_be_missing(
    hub: Hub,  # noqa: F811
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


def test_a_revision_that_leads_out_is_refused(hub: Hub) -> None:  # noqa: F811
    for uri in (f"hf://{REPO}@../x", f"hf://{REPO}/a/../../x", "hf://../x/y"):
        with pytest.raises(NeuroscopeError):
            load_sae(uri)
