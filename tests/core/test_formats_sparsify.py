"""EleutherAI sparsify, against its own `SparseCoder`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae import load_sae, read_sae_info
from neuroscope_vllm.core.sae.info import check_served
from tests.support.saes import (
    D_MODEL,
    WIDTH,
    K,
    assert_same,
    edit_json,
    edit_tensors,
    publisher,
    random_tensors,
    rows,
)

SHAPES = {
    "encoder.weight": (WIDTH, D_MODEL),
    "encoder.bias": (WIDTH,),
    "W_dec": (WIDTH, D_MODEL),
    "b_dec": (D_MODEL,),
}


def write(folder: Path, **changes: object) -> None:
    """Files as its `save_to_disk` writes them, with random parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(SHAPES), folder / "sae.safetensors")
    config: dict[str, object] = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": WIDTH,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_MODEL,
    }
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def dense(acts: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(len(acts), WIDTH).scatter_(1, indices, acts)


@pytest.mark.parametrize("transcode", [False, True])
def test_encodes_and_decodes_as_sparsify_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transcode: bool
) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    write(tmp_path, transcode=transcode)
    theirs = publisher("sparsify.sparse_coder").SparseCoder.load_from_disk(tmp_path)
    ours, x = load_sae(tmp_path), rows()
    f = ours.encode(x)
    with torch.no_grad():
        acts, indices, _ = theirs.encode(x)
        assert_same(f, dense(acts, indices))
        assert_same(ours.decode(f), theirs.decode(acts, indices))


@pytest.mark.parametrize(
    ("folder", "layer", "reads"),
    [
        ("layers.10", 10, "resid_post"),
        ("model.layers.10", 10, "resid_post"),
        ("layers.10.mlp", 10, "layers.10.mlp"),
        ("anything", None, "resid_post"),
    ],
)
def test_the_folder_names_what_it_reads(
    tmp_path: Path, folder: str, layer: int | None, reads: str
) -> None:
    write(tmp_path / folder)
    info = read_sae_info(tmp_path / folder)
    assert (info.format, info.architecture, info.k) == ("sparsify", "topk", K)
    assert (info.layer, info.hook_point, info.width) == (layer, reads, WIDTH)
    assert read_sae_info(tmp_path / folder / "sae.safetensors").layer == layer
    if reads == "resid_post":
        check_served(info)
    else:
        with pytest.raises(SAEError, match=r"reads layers\.10\.mlp, but a server hooks"):
            check_served(info)


def test_a_transcoder_says_what_it_predicts(tmp_path: Path) -> None:
    write(tmp_path / "layers.3.mlp", transcode=True)
    info = read_sae_info(tmp_path / "layers.3.mlp")
    assert (info.layer, info.hook_point) == (3, "layers.3.mlp.input")
    assert info.output_point == "layers.3.mlp.output"


def test_a_width_by_expansion_factor_is_read(tmp_path: Path) -> None:
    write(tmp_path, num_latents=0, expansion_factor=WIDTH // D_MODEL)
    assert read_sae_info(tmp_path).width == WIDTH


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "groupmax"}, "activation='groupmax', which is not served"),
        ({"signed": True}, "signed=True, which is not served"),
        ({"k": 0}, "k=0, which is no number of its 64 features"),
        ({"k": ...}, "k=None, which is no number"),
        ({"d_in": 8}, "d_in=8 in its configuration but tensors of 16; give files that belong"),
        ({"d_in": "16"}, "d_in='16' in its configuration, which must be a whole number"),
        ({"num_latents": 999}, "num_latents=999 in its configuration but tensors of 64"),
        (
            {"num_latents": 0},
            r"expansion_factor \* d_in=512 in its configuration but tensors of 64",
        ),
        ({"transcode": "false"}, "transcode='false' in its configuration, which must be true or"),
        ({"transcode": None}, "transcode=None in its configuration, which must be true or false"),
        ({"signed": 0}, "signed=0, which is not served"),
    ],
)
def test_what_it_asks_beyond_us_is_refused(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    write(tmp_path)
    edit_json(tmp_path / "cfg.json", **changes)
    with pytest.raises(SAEError, match=says):
        read_sae_info(tmp_path)


def test_a_skip_connection_is_refused(tmp_path: Path) -> None:
    write(tmp_path, skip_connection=True)
    with pytest.raises(SAEError, match="skip_connection=True, which is not served"):
        read_sae_info(tmp_path)
    edit_json(tmp_path / "cfg.json", skip_connection=False)
    edit_tensors(tmp_path / "sae.safetensors", W_skip=torch.zeros(D_MODEL, D_MODEL))
    with pytest.raises(SAEError, match="holds W_skip besides"):
        read_sae_info(tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    weights = tmp_path / "sae.safetensors"
    edit_tensors(weights, **{"encoder.bias": torch.full((WIDTH,), float("inf"))})
    with pytest.raises(SAEError, match="NaN or infinity in b_enc"):
        load_sae(tmp_path)
    edit_tensors(weights, **{"encoder.bias": torch.zeros(WIDTH, dtype=torch.int32)})
    with pytest.raises(SAEError, match="stores b_enc as I32"):
        load_sae(tmp_path)
    edit_tensors(weights, **{"encoder.bias": torch.zeros(WIDTH), "W_dec": torch.zeros(3, 3)})
    with pytest.raises(SAEError, match=r"W_dec of shape \[3, 3\]"):
        load_sae(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SAEError, match="truncated or corrupt weights"):
        load_sae(tmp_path)
