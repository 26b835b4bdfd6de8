"""Gemma Scope 2's safetensors, against SAELens' JumpReLU with its configuration for Gemma 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae import check_fits, load_sae, read_sae_info
from tests.support.saes import D_MODEL, WIDTH, assert_same, edit_tensors, rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SAELens' own imports

SUITE = "gemma-scope-2-4b-it"


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "w_enc": (D_MODEL, WIDTH),
        "w_dec": (WIDTH, D_MODEL),
        "b_enc": (WIDTH,),
        "b_dec": (D_MODEL,),
    }
    made = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return made | {"threshold": torch.rand(WIDTH, generator=draw) * 4}


def write(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors(), folder / "params.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu"} | config))
    return folder


def test_encodes_and_decodes_as_saelens_does(tmp_path: Path) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_MODEL, d_sae=WIDTH, apply_b_dec_to_input=False))
    upper = {"w_enc": "W_enc", "w_dec": "W_dec"}
    theirs.load_state_dict({upper.get(name, name): t for name, t in tensors().items()})
    ours, x = load_sae(write(tmp_path / "sae")), rows()
    with torch.no_grad():
        assert_same(ours.encode(x), theirs.encode(x))
        assert_same(ours.decode(ours.encode(x)), theirs(x))


def test_without_a_configuration_the_path_says_what_it_reads(tmp_path: Path) -> None:
    folder = tmp_path / SUITE / "resid_post/layer_17_width_16k_l0_medium"
    info = read_sae_info(write(folder))
    assert (info.format, info.layer, info.hook_point) == ("gemma-scope-2", 17, "resid_post")
    assert (info.model_name, info.output_point) == ("gemma-3-4b-it", None)
    check_fits(info, d_model=D_MODEL, num_layers=34, layer=17)
    assert load_sae(folder / "params.safetensors").info.width == WIDTH


def test_the_configuration_is_believed_before_the_path(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "resid_post/layer_17_width_16k_l0_medium",
        model_name="google/gemma-3-4b-pt",
        hf_hook_point_in="model.layers.9.output",
    )
    info = read_sae_info(folder)
    assert (info.layer, info.hook_point, info.model_name) == (
        9,
        "resid_post",
        "google/gemma-3-4b-pt",
    )


@pytest.mark.parametrize(
    ("folder", "reads", "predicts"),
    [
        ("attn_out", "model.layers.9.self_attn.o_proj.input", None),
        ("mlp_out_all", "model.layers.9.post_feedforward_layernorm.output", None),
        (
            "transcoder_all",
            "model.layers.9.pre_feedforward_layernorm.output",
            "model.layers.9.post_feedforward_layernorm.output",
        ),
    ],
)
def test_other_places_are_recorded_and_not_served(
    tmp_path: Path, folder: str, reads: str, predicts: str | None
) -> None:
    info = read_sae_info(write(tmp_path / SUITE / folder / "layer_9_width_16k_l0_small"))
    assert (info.layer, info.hook_point, info.output_point) == (9, reads, predicts)
    with pytest.raises(SAEError, match="but a server hooks only the residual stream"):
        check_fits(info, d_model=D_MODEL, num_layers=34, layer=9)


def test_what_is_not_a_plain_jumprelu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="is a crosscoder, which spans layers; choose one of resid"):
        read_sae_info(write(tmp_path / "crosscoder/layer_9_width_16k_l0_small"))
    with pytest.raises(SAEError, match="architecture='relu', which is not served"):
        read_sae_info(write(tmp_path / "relu", architecture="relu"))
    for name in ("architecture", "model_name", "hf_hook_point_in", "hf_hook_point_out"):
        with pytest.raises(SAEError, match=rf"{name}=\['x'\]"):
            read_sae_info(write(tmp_path / name, **{name: ["x"]}))
    skip = write(tmp_path / "skip")
    edit_tensors(skip / "params.safetensors", affine_skip_connection=torch.zeros(2))
    with pytest.raises(SAEError, match="holds affine_skip_connection besides"):
        read_sae_info(skip)
    nan = write(tmp_path / "nan")
    edit_tensors(nan / "params.safetensors", w_dec=torch.full((WIDTH, D_MODEL), float("nan")))
    with pytest.raises(SAEError, match="NaN or infinity in W_dec"):
        load_sae(nan)
    whole = write(tmp_path / "short") / "params.safetensors"
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(SAEError, match="truncated or corrupt weights"):
        load_sae(whole)
