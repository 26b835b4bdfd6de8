"""SAELens' architectures and normalisations, against SAELens' own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae import load_sae, read_sae_info
from neuroscope_vllm.core.sae.info import check_fits, check_served
from tests.support.saes import (
    D_MODEL,
    WIDTH,
    K,
    assert_same,
    edit_json,
    edit_tensors,
    randomise,
    rows,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SAELens' own imports

KINDS = {"standard": "Standard", "jumprelu": "JumpReLU", "topk": "TopK", "gated": "Gated"}
BY_ROW = ("constant_norm_rescale", "layer_norm")


def reference(architecture: str, **config: Any):
    """An SAE of SAELens with random parameters."""
    import sae_lens

    if architecture == "topk":
        config["k"] = K
    kind = KINDS[architecture]
    settings = getattr(sae_lens, f"{kind}SAEConfig")(d_in=D_MODEL, d_sae=WIDTH, **config)
    sae = getattr(sae_lens, f"{kind}SAE")(settings)
    randomise(sae)
    sae.cfg.metadata.hook_name = "blocks.20.hook_resid_post"
    return sae


@pytest.mark.parametrize("normalize", ["none", *BY_ROW])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", KINDS)
def test_every_architecture_encodes_and_decodes_as_saelens_does(
    tmp_path: Path, architecture: str, apply_b_dec_to_input: bool, normalize: str
) -> None:
    theirs = reference(
        architecture, apply_b_dec_to_input=apply_b_dec_to_input, normalize_activations=normalize
    )
    theirs.save_model(tmp_path)
    ours, x = load_sae(tmp_path), rows()
    f = ours.encode(x)
    assert 0 < (f > 0).float().mean() < 1
    with torch.no_grad():
        assert_same(f, theirs.encode(x))
        assert_same(ours.decode(f, of=x), theirs(x))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_topk_by_decoder_norm_selects_as_saelens_does(
    tmp_path: Path, apply_b_dec_to_input: bool
) -> None:
    theirs = reference(
        "topk", rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=apply_b_dec_to_input
    )
    theirs.W_dec.data *= torch.linspace(0.1, 5, WIDTH).unsqueeze(1)
    theirs.save_model(tmp_path)
    ours, x = load_sae(tmp_path), rows()
    with torch.no_grad():
        assert_same(ours.encode(x), theirs.encode(x))
        assert_same(ours.decode(ours.encode(x)), theirs(x))
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(WIDTH))


def test_topk_keeps_k_of_a_tie_and_nothing_below_zero(tmp_path: Path) -> None:
    theirs = reference("topk", apply_b_dec_to_input=False)
    theirs.W_enc.data.fill_(1.0)
    theirs.b_enc.data.zero_()
    theirs.save_model(tmp_path)
    f = load_sae(tmp_path).encode(torch.stack([torch.ones(D_MODEL), -torch.ones(D_MODEL)]))
    assert (f > 0).sum(dim=1).tolist() == [K, 0]
    assert f[0].max() == D_MODEL
    assert not torch.signbit(f).any()


def test_a_gate_at_its_edge_is_closed(tmp_path: Path) -> None:
    """Strict on both paths; exact numbers, so that rounding cannot decide."""
    theirs = reference("gated", apply_b_dec_to_input=False)
    for parameter in theirs.parameters():
        parameter.data.zero_()
    theirs.W_enc.data[0, :5] = 1.0
    theirs.b_gate.data[:5] = torch.tensor([-2.0, -1.5, 0.0, 0.0, -1.0])
    theirs.b_mag.data[:5] = torch.tensor([1.0, 1.0, -2.0, -1.0, 0.0])
    theirs.save_model(tmp_path)
    x = torch.zeros(2, D_MODEL)
    x[:, 0] = torch.tensor([2.0, -0.0])
    f = load_sae(tmp_path).encode(x)
    assert f[:, :5].tolist() == [[0.0, 3.0, 0.0, 1.0, 2.0], [0.0] * 5]
    assert torch.equal(f, theirs.encode(x))
    assert not torch.signbit(f).any()


def test_a_normalised_sae_needs_the_rows_to_decode(tmp_path: Path) -> None:
    reference("standard", normalize_activations="layer_norm").save_model(tmp_path)
    sae = load_sae(tmp_path)
    with pytest.raises(SAEError, match="so activations alone do not say how large a row was; give"):
        sae.decode(torch.zeros(1, WIDTH))
    assert sae.fvu(rows()) > 0


@pytest.mark.parametrize("normalize", ["none", *BY_ROW])
@pytest.mark.parametrize("architecture", KINDS)
def test_whatever_reads_the_residual_stream_is_served(
    tmp_path: Path, architecture: str, normalize: str
) -> None:
    reference(architecture, normalize_activations=normalize).save_model(tmp_path)
    info = read_sae_info(tmp_path)
    check_fits(info, d_model=D_MODEL, num_layers=26, layer=20)
    assert info.input_norm == (None if normalize == "none" else normalize)


@pytest.mark.parametrize(
    ("normalize", "says"),
    [
        ("expected_average_only_in", "fold it in with SAELens' fold_activation_norm_scaling_fac"),
        ("covariance_whitening", "fold it in with SAELens' fold_activation_whitening and save"),
        ("batch_norm", "normalize_activations='batch_norm', which is not served"),
    ],
)
def test_a_normalisation_that_is_not_in_the_files_is_refused(
    tmp_path: Path, normalize: str, says: str
) -> None:
    reference("standard").save_model(tmp_path)
    edit_json(tmp_path / "cfg.json", normalize_activations=normalize)
    with pytest.raises(SAEError, match=says):
        read_sae_info(tmp_path)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_checkpoint_of_its_trainer_has_its_scale_beside_it(
    tmp_path: Path, architecture: str
) -> None:
    """SAELens folds the scale in when training ends; until then it saves it in another file."""
    from sae_lens.training.activation_scaler import ActivationScaler

    theirs = reference(architecture, normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    scaler = ActivationScaler(scaling_factor=0.25)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    ours, x = load_sae(tmp_path), rows()
    assert ours.info == read_sae_info(tmp_path)
    with torch.no_grad():
        assert_same(ours.encode(x), theirs.encode(scaler(x)))
        assert_same(ours.decode(ours.encode(x)), scaler.unscale(theirs(scaler(x))))


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (0, "scaling_factor=0 in its activation_scaler.json, which is no positive number"),
        (-1.5, "scaling_factor=-1.5 in its"),
        (float("nan"), "scaling_factor=nan in its"),
        (None, "scaling_factor=None in its"),
        ("0.25", "scaling_factor='0.25' in its configuration, which must be a number"),
        (True, "scaling_factor=True in its configuration, which must be a number"),
    ],
)
def test_a_scale_that_is_none_is_refused(tmp_path: Path, scale: object, says: str) -> None:
    reference("standard", normalize_activations="expected_average_only_in").save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    for read in (read_sae_info, load_sae):
        with pytest.raises(SAEError, match=says):
            read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input='false' .* be true or false"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input=None .* must be true or false"),
        ({"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm=1 .* true or false"),
        ({"normalize_activations": {}}, "normalize_activations={}, which is not served"),
        ({"normalize_activations": ""}, "normalize_activations='', which is not served"),
        ({"normalize_activations": 0}, "normalize_activations=0, which is not served"),
        ({"reshape_activations": []}, r"reshape_activations=\[\], which is not served"),
        ({"activation_fn": []}, r"activation_fn=\[\] in its configuration, which must be text"),
        ({"activation_fn_str": 0}, "activation_fn_str=0 in its configuration, which must be text"),
        ({"activation_fn_kwargs": [], "k": ...}, r"activation_fn_kwargs=\[\] .* be an object"),
        ({"architecture": ["topk"]}, r"architecture \['topk'\]; choose one of"),
        ({"metadata": []}, r"metadata=\[\] in its configuration, which must be an object"),
        ({"metadata": {"hook_name": 3}}, "hook_name=3 in its configuration, which must be text"),
        ({"metadata": {}, "hook_layer": "3"}, "hook_layer='3' .* must be a whole number"),
        ({"metadata": {}, "hook_point_layer": True}, "hook_point_layer=True .* whole number"),
        ({"d_in": 999}, "d_in=999 in its configuration but tensors of 16; give files that belong"),
        ({"d_sae": 999}, "d_sae=999 in its configuration but tensors of 64; give files"),
        ({"d_in": "16"}, "d_in='16' in its configuration, which must be a whole number"),
    ],
)
def test_a_setting_of_another_type_or_size_is_refused(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    reference("topk").save_model(tmp_path)
    edit_json(tmp_path / "cfg.json", **changes)
    with pytest.raises(SAEError, match=says):
        read_sae_info(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "tensors", "name"),
    [
        ("gated", {"r_mag": torch.full((WIDTH,), 100.0)}, "W_enc"),
        ("gated", {"r_mag": torch.full((WIDTH,), 1000.0)}, "W_enc"),
        ("standard", {"b_dec": torch.full((D_MODEL,), 3e38)}, "b_enc"),
        ("topk", {"W_dec": torch.full((WIDTH, D_MODEL), 3e38)}, "W_enc"),
    ],
)
def test_folding_that_overflows_is_refused(
    tmp_path: Path, architecture: str, tensors: dict[str, torch.Tensor], name: str
) -> None:
    settings = {"rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    reference(architecture, **settings).save_model(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    edit_tensors(weights, W_enc=torch.full((D_MODEL, WIDTH), 2.0), **tensors)
    with pytest.raises(SAEError, match=f"so large that {name} overflows float32 once its scales"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e8m0fnu, "F8_E8M0"),
        (torch.complex64, "C64"),
        (torch.bool, "BOOL"),
    ],
)
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "scaling_factor"])
def test_tensors_of_other_types_are_refused(
    tmp_path: Path, name: str, dtype: torch.dtype, says: str
) -> None:
    reference("standard").save_model(tmp_path)
    shape = (D_MODEL, WIDTH) if name == "W_enc" else (WIDTH,)
    tensor = torch.full(shape, 2.0).to(dtype)
    edit_tensors(tmp_path / "sae_weights.safetensors", **{name: tensor})
    says = "finetuned scaling_factor" if name == "scaling_factor" else f"stores {name} as {says}"
    with pytest.raises(SAEError, match=says):
        load_sae(tmp_path)


def test_the_refusals_advice_works(tmp_path: Path) -> None:
    """What `fold_activation_norm_scaling_factor` folds is read as the scaled SAE that it was."""
    theirs = reference("standard", normalize_activations="expected_average_only_in")
    x = rows()
    with torch.no_grad():
        want = theirs.encode(x * 0.25)
    theirs.fold_activation_norm_scaling_factor(0.25)
    theirs.save_model(tmp_path)
    assert_same(load_sae(tmp_path).encode(x), want)


@pytest.mark.parametrize("architecture", ["abstopk", "transcoder", "temporal", "matching_pursuit"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    reference("standard").save_model(tmp_path)
    edit_json(tmp_path / "cfg.json", architecture=architecture)
    says = f"architecture '{architecture}'; choose one of standard, jumprelu, topk, gated"
    with pytest.raises(SAEError, match=says):
        read_sae_info(tmp_path)


def test_topk_from_before_saelens_6_is_read(tmp_path: Path) -> None:
    theirs = reference("topk")
    theirs.save_model(tmp_path)
    edit_json(
        tmp_path / "cfg.json",
        architecture=...,
        k=...,
        metadata=...,
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        hook_point="blocks.3.hook_resid_pre",
    )
    info = read_sae_info(tmp_path)
    assert (info.architecture, info.k, info.layer) == ("topk", K, 2)
    with torch.no_grad():
        assert_same(load_sae(tmp_path).encode(rows()), theirs.encode(rows()))


@pytest.mark.parametrize("k", [0, WIDTH + 1, "5", None, True, 2.5])
def test_a_k_that_is_none_is_refused(tmp_path: Path, k: object) -> None:
    reference("topk").save_model(tmp_path)
    edit_json(tmp_path / "cfg.json", k=k)
    with pytest.raises(SAEError, match="which is no number of its 64 features"):
        read_sae_info(tmp_path)


@pytest.mark.parametrize("name", ["b_gate", "b_mag", "r_mag"])
def test_a_gates_tensors_are_checked(tmp_path: Path, name: str) -> None:
    reference("gated").save_model(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    edit_tensors(weights, **{name: torch.full((WIDTH,), float("nan"))})
    with pytest.raises(SAEError, match=f"NaN or infinity in {name}"):
        load_sae(tmp_path)
    edit_tensors(weights, **{name: torch.zeros(3)})
    with pytest.raises(SAEError, match=rf"{name} of shape \[3\]"):
        load_sae(tmp_path)
    edit_tensors(weights, **{name: None})
    with pytest.raises(SAEError, match=f"lacks {name} .*; a gated autoencoder has"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("hook", "reshape"),
    [("blocks.20.hook_mlp_out", "none"), ("blocks.20.attn.hook_z", "hook_z")],
)
def test_another_hook_point_is_recorded_and_not_served(
    tmp_path: Path, hook: str, reshape: str
) -> None:
    reference("standard").save_model(tmp_path)
    edit_json(tmp_path / "cfg.json", metadata={"hook_name": hook}, reshape_activations=reshape)
    info = load_sae(tmp_path).info
    assert (info.layer, info.hook_point) == (20, hook)
    with pytest.raises(SAEError, match=f"reads {hook}, but a server hooks only the residual"):
        check_served(info)
