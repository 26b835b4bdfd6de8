"""Llama Scope, against its authors' formula and against SAELens' conversion."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae import check_fits, load_sae, read_sae_info
from tests.support.saes import D_MODEL, WIDTH, assert_same, edit_json, edit_tensors, rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SAELens' own imports

THRESHOLD = 0.53
NORM = {"in": 29.125, "out": 29.125}
CONFIG = {
    "d_model": D_MODEL,
    "d_sae": WIDTH,
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "act_fn": "jumprelu",
    "jump_relu_threshold": THRESHOLD,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": NORM,
    "top_k": 50,
    "hook_point_in": "blocks.24.hook_resid_post",
    "hook_point_out": "blocks.24.hook_resid_post",
}


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "encoder.weight": (WIDTH, D_MODEL),
        "encoder.bias": (WIDTH,),
        "decoder.weight": (D_MODEL, WIDTH),
        "decoder.bias": (D_MODEL,),
    }
    return {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    save_file(tensors(), tmp_path / "checkpoints/final.safetensors")
    (tmp_path / "hyperparams.json").write_text(json.dumps(CONFIG))
    return tmp_path


def by_authors(x: Tensor, norm: dict[str, float]) -> tuple[Tensor, Tensor]:
    """(activations, output) of lm-saes in its inference mode, in fp64.

    lm-saes cannot be installed here; this is its published formula: the encoder of the scaled
    input, in units of the raw one, where its scalar threshold applies.
    """
    w = {name: tensor.double() for name, tensor in tensors().items()}
    scale_in, scale_out = (math.sqrt(D_MODEL) / norm[end] for end in ("in", "out"))
    pre = ((x.double() * scale_in) @ w["encoder.weight"].t() + w["encoder.bias"]) / scale_in
    f = pre.where(pre > THRESHOLD, 0)
    scaled = (f * scale_in) @ w["decoder.weight"].t() + w["decoder.bias"]
    return f.float(), (scaled / scale_out).float()


@pytest.mark.parametrize("norm", [NORM, {"in": 29.125, "out": 3.4}])
def test_encodes_and_decodes_as_its_authors_do(folder: Path, norm: dict[str, float]) -> None:
    edit_json(folder / "hyperparams.json", dataset_average_activation_norm=norm)
    ours, x = load_sae(folder), rows()
    f, rebuilt = by_authors(x, norm)
    assert 0.05 < (f > 0).float().mean() < 0.95
    assert_same(ours.encode(x), f)
    assert_same(ours.decode(ours.encode(x)), rebuilt)


def test_is_what_saelens_makes_of_it_in_raw_units(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def local(repo_id: str, filename: str, subfolder: str = "", **_: object) -> str:
        return str(folder / subfolder / filename)

    # Its loader runs whole; only the download is of this folder.
    monkeypatch.setattr(loaders, "hf_hub_download", local)
    config, state, _ = loaders.llama_scope_sae_huggingface_loader(
        "fnlp/x", str(folder), cfg_overrides={"dtype": "float32"}
    )
    theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_MODEL, d_sae=WIDTH, apply_b_dec_to_input=False))
    theirs.load_state_dict(state)
    scale = math.sqrt(config["d_in"]) / NORM["in"]
    theirs.fold_activation_norm_scaling_factor(scale)
    ours, x = load_sae(folder), rows()
    with torch.no_grad():
        assert_same(ours.encode(x) * scale, theirs.encode(x))
        assert_same(ours.decode(ours.encode(x)), theirs(x))


def test_its_configuration_says_what_it_reads(folder: Path) -> None:
    info = read_sae_info(folder)
    assert info == load_sae(folder).info
    assert load_sae(folder / "checkpoints/final.safetensors").info.layer == 24
    assert (info.format, info.architecture, info.layer) == ("llama-scope", "jumprelu", 24)
    assert (info.hook_point, info.model_name) == ("resid_post", "meta-llama/Llama-3.1-8B")
    check_fits(info, d_model=D_MODEL, num_layers=32, layer=24)


def test_a_transcoder_is_for_the_library_alone(folder: Path) -> None:
    reads, writes = "blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"
    edit_json(folder / "hyperparams.json", hook_point_in=reads, hook_point_out=writes)
    info = load_sae(folder).info
    assert (info.layer, info.hook_point, info.output_point) == (8, reads, writes)
    with pytest.raises(SAEError, match="but a server hooks only the residual stream"):
        check_fits(info, d_model=D_MODEL, num_layers=32, layer=8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"act_fn": "topk"}, "act_fn='topk', which is not served"),
        ({"norm_activation": "token-wise"}, "norm_activation='token-wise', which is not served"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder=True"),
        ({"use_glu_encoder": True}, "use_glu_encoder=True, which is not served"),
        ({"dataset_average_activation_norm": ...}, "lacks d_model, a threshold or a dataset norm"),
        ({"dataset_average_activation_norm": {"in": True, "out": 1}}, "in=True .* be a number"),
        ({"dataset_average_activation_norm": [1, 1]}, r"=\[1, 1\] .* must be an object"),
        ({"dataset_average_activation_norm": {"in": 10**400, "out": 1}}, "no positive number"),
        ({"jump_relu_threshold": "0.5"}, "jump_relu_threshold='0.5' .* must be a number"),
        ({"jump_relu_threshold": 10**400}, "that is no positive number"),
        ({"d_model": 17}, "d_model=17 in its configuration but tensors of 16; give files"),
        ({"d_sae": 999}, "d_sae=999 in its configuration but tensors of 64; give files"),
        ({"d_model": "16"}, "d_model='16' in its configuration, which must be a whole number"),
        ({"use_glu_encoder": 0}, "use_glu_encoder=0, which is not served"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "that is no positive number"),
        ({"dataset_average_activation_norm": {"in": -1, "out": 1}}, "that is no positive number"),
        ({"jump_relu_threshold": float("nan")}, "that is no positive number"),
        ({"hook_point_in": ...}, "does not say what it reads"),
    ],
)
def test_what_it_asks_beyond_us_is_refused(
    folder: Path, changes: dict[str, object], says: str
) -> None:
    edit_json(folder / "hyperparams.json", **changes)
    with pytest.raises(SAEError, match=says):
        read_sae_info(folder)


def test_damage_is_named(folder: Path) -> None:
    weights = folder / "checkpoints/final.safetensors"
    edit_tensors(weights, **{"decoder.bias": torch.full((D_MODEL,), float("nan"))})
    with pytest.raises(SAEError, match="NaN or infinity in b_dec"):
        load_sae(folder)
    edit_tensors(weights, **{"decoder.bias": None})
    with pytest.raises(SAEError, match="lacks b_dec"):
        load_sae(folder)
    edit_tensors(weights, **{"decoder.bias": torch.zeros(3)})
    with pytest.raises(SAEError, match=r"b_dec of shape \[3\]"):
        load_sae(folder)
    weights.write_bytes(b"{}")
    with pytest.raises(SAEError, match="truncated or corrupt weights"):
        load_sae(folder)
