"""Loading each format, against SAELens' own code, and every refusal."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae import check_fits, load_sae, read_sae_info

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SAELens' own imports

D_MODEL, WIDTH = 16, 64


def reference(architecture: str, **config: object):
    """An SAE of SAELens with random parameters."""
    import sae_lens

    kind = {"standard": "Standard", "jumprelu": "JumpReLU"}[architecture]
    settings = getattr(sae_lens, f"{kind}SAEConfig")(d_in=D_MODEL, d_sae=WIDTH, **config)
    sae = getattr(sae_lens, f"{kind}SAE")(settings)
    draw = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    sae.cfg.metadata.hook_name = "blocks.20.hook_resid_post"
    sae.cfg.metadata.model_name = "gemma-2-2b"
    sae.cfg.metadata.neuronpedia_id = "gemma-2-2b/20-gemmascope-res-16k"
    return sae


@pytest.fixture
def saelens_folder(tmp_path: Path) -> Path:
    reference("jumprelu").save_model(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "cfg.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "sae_weights.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "sae_weights.safetensors")


def gemma_arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {
        "W_enc": (D_MODEL, WIDTH),
        "W_dec": (WIDTH, D_MODEL),
        "b_enc": WIDTH,
        "b_dec": D_MODEL,
    }
    arrays = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    arrays["threshold"] = draw.uniform(0.5, 2.0, size=WIDTH)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def write_gemma(folder: Path, **changes: np.ndarray | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = gemma_arrays() | changes
    kept: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None}
    np.savez(folder / "params.npz", **kept)
    return folder


# --- SAELens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_saelens_encodes_and_decodes_as_saelens_does(
    tmp_path: Path, architecture: str, apply_b_dec_to_input: bool
) -> None:
    theirs = reference(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    x = torch.randn(200, D_MODEL)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), atol=1e-5, rtol=1e-5)


def test_a_trained_batchtopk_is_read_as_saelens_saves_it_for_inference(tmp_path: Path) -> None:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, JumpReLUSAE

    trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=WIDTH, k=4))
    trained.save_inference_model(tmp_path)
    theirs = JumpReLUSAE.load_from_disk(tmp_path)
    x = torch.randn(50, D_MODEL)
    with torch.no_grad():
        torch.testing.assert_close(load_sae(tmp_path).encode(x), theirs.encode(x))


def test_saelens_info_comes_from_its_metadata(saelens_folder: Path) -> None:
    info = read_sae_info(saelens_folder)
    assert info == load_sae(saelens_folder).info
    assert (info.format, info.architecture) == ("saelens", "jumprelu")
    assert (info.d_model, info.width, info.layer) == (D_MODEL, WIDTH, 20)
    assert (info.model_name, info.revision) == ("gemma-2-2b", None)
    assert info.neuronpedia_id == "gemma-2-2b/20-gemmascope-res-16k"


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_file_of_the_folder_stands_for_the_folder(saelens_folder: Path, name: str) -> None:
    assert load_sae(saelens_folder / name).width == WIDTH


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.0.hook_resid_post", 0),
        ("blocks.7.hook_resid_pre", 6),
        ("model.layers.12", 12),
        ("layers.3.output", 3),
    ],
)
def test_the_layer_is_read_from_the_hook_name(saelens_folder: Path, hook: str, layer: int) -> None:
    edit_config(saelens_folder, metadata={"hook_name": hook})
    assert read_sae_info(saelens_folder).layer == layer


def test_configurations_from_before_saelens_6_are_read(saelens_folder: Path) -> None:
    edit_config(
        saelens_folder,
        metadata=...,
        architecture=...,
        apply_b_dec_to_input=...,
        normalize_activations=False,
        activation_fn_str="relu",
        hook_point="blocks.4.hook_resid_post",
        model_name="gpt2-small",
    )
    edit_tensors(saelens_folder, threshold=None, scaling_factor=torch.ones(WIDTH))
    info = load_sae(saelens_folder).info
    assert (info.layer, info.architecture, info.model_name) == (4, "standard", "gpt2-small")
    edit_config(saelens_folder, hook_point=..., hook_point_layer=9)
    assert read_sae_info(saelens_folder).layer == 9


def test_half_precision_weights_are_widened(saelens_folder: Path) -> None:
    tensors = load_file(saelens_folder / "sae_weights.safetensors")
    edit_tensors(saelens_folder, **{k: v.bfloat16() for k, v in tensors.items()})
    sae = load_sae(saelens_folder)
    assert sae.W_enc.dtype == sae.W_dec.dtype == sae.threshold.dtype == torch.float32
    torch.testing.assert_close(sae.W_dec, tensors["W_dec"].bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "lack the scaling factor; fold"),
        ({"normalize_activations": True}, "lack the scaling factor; fold it in with SAELens'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z', which is not served"),
        ({"activation_fn_str": "topk"}, "activation_fn='topk', which is not served"),
    ],
)
def test_what_the_configuration_asks_beyond_us_is_refused_by_name(
    saelens_folder: Path, changes: dict[str, object], says: str
) -> None:
    edit_config(saelens_folder, **changes)
    with pytest.raises(SAEError, match=says):
        read_sae_info(saelens_folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threshold": None}, "lacks threshold .it holds W_dec, W_enc, b_dec, b_enc."),
        ({"W_skip": torch.zeros(2)}, "holds W_skip besides W_enc, b_enc, W_dec, b_dec, threshold"),
        ({"b_enc": torch.zeros(WIDTH, dtype=torch.int32)}, "stores b_enc as I32"),
        ({"W_enc": torch.zeros(WIDTH)}, r"W_enc of shape \[64\]; it must be \[d_model, width\]"),
        ({"W_enc": torch.zeros(D_MODEL, 0)}, r"W_enc of shape \[16, 0\]"),
        ({"W_dec": torch.zeros(D_MODEL, WIDTH)}, r"W_dec of shape \[16, 64\], which disagrees"),
        ({"b_dec": torch.zeros(WIDTH)}, r"b_dec of shape \[64\], .*; it must be \[16\]"),
        ({"threshold": torch.zeros(1)}, r"threshold of shape \[1\], .*; it must be \[64\]"),
        ({"scaling_factor": torch.full((WIDTH,), 2.0)}, "a finetuned scaling_factor; fold it"),
    ],
)
def test_tensors_that_are_not_an_sae_are_refused(
    saelens_folder: Path, changes: dict[str, torch.Tensor | None], says: str
) -> None:
    edit_tensors(saelens_folder, **changes)
    with pytest.raises(SAEError, match=says):
        read_sae_info(saelens_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_a_tensor_with_nan_or_infinity_is_named(
    saelens_folder: Path, name: str, value: float
) -> None:
    tensor = load_file(saelens_folder / "sae_weights.safetensors")[name]
    tensor.view(-1)[-1] = value
    edit_tensors(saelens_folder, **{name: tensor})
    with pytest.raises(SAEError, match=f"NaN or infinity in {name},"):
        load_sae(saelens_folder)


@pytest.mark.parametrize(("text", "says"), [("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_broken_configuration_is_refused(saelens_folder: Path, text: str, says: str) -> None:
    (saelens_folder / "cfg.json").write_text(text)
    with pytest.raises(SAEError, match=f"a cfg.json that is {says}"):
        read_sae_info(saelens_folder)


def test_truncated_safetensors_are_refused(saelens_folder: Path) -> None:
    path = saelens_folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SAEError, match="truncated or corrupt weights"):
        load_sae(saelens_folder)


# --- Gemma Scope ----------------------------------------------------------------------------------


def saelens_gemma(folder: Path):
    """The same file as SAELens reads it: its configuration for Gemma 2, its JumpReLU."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_MODEL, d_sae=WIDTH, apply_b_dec_to_input=False))
    arrays = np.load(folder / "params.npz")
    theirs.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return theirs


def test_gemma_scope_encodes_as_saelens_does(tmp_path: Path) -> None:
    ours, theirs = load_sae(write_gemma(tmp_path)), saelens_gemma(tmp_path)
    x = torch.randn(200, D_MODEL)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), atol=1e-5, rtol=1e-5)


def test_gemma_scope_info_comes_from_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    info = read_sae_info(write_gemma(folder))
    assert info == load_sae(folder).info
    assert (info.format, info.architecture, info.layer) == ("gemma-scope", "jumprelu", 20)
    assert (info.d_model, info.width, info.hook_point) == (D_MODEL, WIDTH, "resid_post")
    assert info.model_name == "gemma-2-2b"
    assert info.neuronpedia_id == "gemma-2-2b/20-gemmascope-res-16k"


@pytest.mark.parametrize(
    ("path", "model", "shown"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_139", "gemma-2-2b", None),
        (
            "gemma-scope-2b-pt-res/layer_20/width_65k/average_l0_114",
            "gemma-2-2b",
            "gemma-2-2b/20-gemmascope-res-65k",
        ),
        (
            "gemma-scope-9b-it-res/layer_20/width_16k/average_l0_91",
            "gemma-2-9b-it",
            "gemma-2-9b-it/20-gemmascope-res-16k",
        ),
        ("layer_20/width_16k/average_l0_71", None, None),
    ],
)
def test_only_what_neuronpedia_shows_has_its_id(
    tmp_path: Path, path: str, model: str | None, shown: str | None
) -> None:
    info = read_sae_info(write_gemma(tmp_path / path))
    assert (info.model_name, info.neuronpedia_id, info.layer) == (model, shown, 20)


def test_a_renamed_npz_and_lower_case_names_are_read(tmp_path: Path) -> None:
    arrays = gemma_arrays()
    folder = write_gemma(
        tmp_path, W_enc=None, W_dec=None, w_enc=arrays["W_enc"], w_dec=arrays["W_dec"]
    )
    renamed = (folder / "params.npz").rename(folder / "my-sae.npz")
    sae = load_sae(renamed)
    assert sae.info.layer is None
    np.testing.assert_array_equal(sae.W_enc.numpy(), arrays["W_enc"])


def test_big_endian_and_fp64_arrays_are_read(tmp_path: Path) -> None:
    arrays = gemma_arrays()
    folder = write_gemma(
        tmp_path, W_enc=arrays["W_enc"].astype(">f4"), b_enc=arrays["b_enc"].astype(np.float64)
    )
    sae = load_sae(folder)
    np.testing.assert_array_equal(sae.W_enc.numpy(), arrays["W_enc"])
    np.testing.assert_array_equal(sae.b_enc.numpy(), arrays["b_enc"])


def test_reading_the_info_reads_no_array(tmp_path: Path) -> None:
    folder = write_gemma(tmp_path, W_enc=np.full((D_MODEL, WIDTH), np.nan, dtype=np.float32))
    assert read_sae_info(folder).width == WIDTH
    with pytest.raises(SAEError, match="NaN or infinity in W_enc"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threshold": None}, "lacks threshold"),
        ({"affine_skip_connection": np.zeros(2)}, "holds affine_skip_connection besides"),
        ({"b_enc": np.zeros(WIDTH, dtype=np.int64)}, "stores b_enc as int64"),
        ({"b_enc": np.zeros(WIDTH, dtype=object)}, "stores b_enc as Python objects, .*run code"),
        ({"W_dec": np.zeros((WIDTH, 3), np.float32)}, r"W_dec of shape \[64, 3\], which disagrees"),
    ],
)
def test_arrays_that_are_not_an_sae_are_refused(
    tmp_path: Path, changes: dict[str, np.ndarray | None], says: str
) -> None:
    folder = write_gemma(tmp_path, **changes)
    with pytest.raises(SAEError, match=says):
        read_sae_info(folder)
    with pytest.raises(SAEError, match=says):
        load_sae(folder)


@pytest.mark.parametrize(
    ("array", "stored"),
    [
        (np.zeros(WIDTH, np.longdouble), "float128"),
        (np.zeros(WIDTH, np.complex64), "complex64"),
        (np.zeros(WIDTH, "datetime64[s]"), r"datetime64\[s\]"),
        (np.zeros(WIDTH, "S4"), "bytes32"),
        (np.zeros(WIDTH, [("x", np.float32)]), "void32"),
    ],
)
def test_arrays_that_torch_has_no_floats_for_are_refused(
    tmp_path: Path, array: np.ndarray, stored: str
) -> None:
    folder = write_gemma(tmp_path, b_enc=array)
    for read in (read_sae_info, load_sae):
        with pytest.raises(SAEError, match=f"stores b_enc as {stored}; export it with floating"):
            read(folder)


def rewrite_member(path: Path, header: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """Replace b_enc by an array of 256 bytes with this header."""
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if "b_enc" not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
        magic = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little")
        archive.writestr("b_enc.npy", magic + header + bytes(256), compression)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("(1099511627776,)", r"b_enc of shape \[1099511627776\] as float32, but stores 256 bytes"),
        ("(-64,)", r"b_enc of shape \[-64\]"),
        ("(-8, -8)", r"b_enc of shape \[-8, -8\], which disagrees with W_enc"),
        ("(8, 8)", r"b_enc of shape \[8, 8\], which disagrees with W_enc"),
        ("(" + "-" * 5000 + "64,)", "truncated or not an npz file"),
    ],
)
def test_a_shape_that_its_file_does_not_hold_is_refused(
    tmp_path: Path, shape: str, says: str
) -> None:
    path = write_gemma(tmp_path) / "params.npz"
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n"
    rewrite_member(path, header.encode())
    for read in (read_sae_info, load_sae):
        with pytest.raises(SAEError, match=says):
            read(tmp_path)


def test_members_that_numpy_does_not_write_are_refused(tmp_path: Path) -> None:
    path = write_gemma(tmp_path) / "params.npz"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (64,)}\n"
    rewrite_member(path, header, compression=zipfile.ZIP_LZMA)
    with pytest.raises(SAEError, match=r"holds b_enc\.npy encrypted, damaged or compressed in"):
        load_sae(tmp_path)
    rewrite_member(path, header, compression=zipfile.ZIP_DEFLATED)
    assert load_sae(tmp_path).b_enc.tolist() == [0.0] * WIDTH
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")  # b_enc's, in the archive's directory
    content[entry + 24 : entry + 28] = (0xFFFFFFF0).to_bytes(4, "little")  # its size, unpacked
    path.write_bytes(content)
    with pytest.raises(SAEError, match=r"holds b_enc\.npy encrypted, damaged or compressed in"):
        load_sae(tmp_path)
    content[entry + 8] |= 1  # encrypted
    content[entry + 24 : entry + 28] = (384).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(SAEError, match=r"holds b_enc\.npy encrypted, damaged or compressed in"):
        load_sae(tmp_path)


def test_an_array_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_gemma(tmp_path) / "params.npz"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w_enc", archive.read("W_enc.npy"))
    with pytest.raises(SAEError, match="holds W_enc twice; export it again"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("suite", "reads", "predicts"),
    [
        ("mlp", "blocks.20.hook_mlp_out", None),
        ("att", "blocks.20.attn.hook_z", None),
        ("transcoders", "blocks.20.ln2.hook_normalized", "blocks.20.hook_mlp_out"),
    ],
)
def test_gemma_scopes_other_suites_are_for_the_library_alone(
    tmp_path: Path, suite: str, reads: str, predicts: str | None
) -> None:
    folder = tmp_path / f"gemma-scope-2b-pt-{suite}/layer_20/width_16k/average_l0_71"
    sae = load_sae(write_gemma(folder))
    assert (sae.info.layer, sae.info.hook_point) == (20, reads)
    assert (sae.info.output_point, sae.info.neuronpedia_id) == (predicts, None)
    assert sae.encode(torch.ones(3, D_MODEL)).shape == (3, WIDTH)
    with pytest.raises(SAEError, match=f"reads {reads}, but a server hooks only the residual"):
        check_fits(sae.info, d_model=D_MODEL, num_layers=26, layer=20)
    if predicts is not None:
        with pytest.raises(SAEError, match=f"predicts {predicts} from {reads}; compare"):
            sae.fvu(torch.ones(3, D_MODEL))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gemma-scope-2b-pt-emb/layer_20", "of the suite 'emb', which is not known; choose one of"),
        ("gemma-scope-2b-pt-res/embedding/width_4k", "reads embeddings, not the residual stream"),
    ],
)
def test_gemma_scope_saes_of_no_layer_are_refused(tmp_path: Path, path: str, says: str) -> None:
    with pytest.raises(SAEError, match=says):
        read_sae_info(write_gemma(tmp_path / path))


def test_the_training_scalar_folds_as_appendix_a_says(tmp_path: Path) -> None:
    """arXiv 2408.05147: an SAE trained on x / C, with b_dec subtracted, takes x after folding."""
    draw, scale = np.random.default_rng(0), 37.5
    w_enc, w_dec = draw.normal(size=(D_MODEL, WIDTH)), draw.normal(size=(WIDTH, D_MODEL))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    b_enc, b_dec = draw.normal(size=WIDTH), draw.normal(size=D_MODEL)
    threshold, x = draw.uniform(0.5, 2, size=WIDTH), draw.normal(size=(300, D_MODEL)) * scale

    pre = (x / scale - b_dec) @ w_enc + b_enc  # as it was trained, in fp64
    trained = np.where(pre > threshold, pre, 0)
    folded = {
        "W_enc": w_enc,
        "W_dec": w_dec,
        "b_enc": scale * b_enc - scale * b_dec @ w_enc,
        "b_dec": scale * b_dec,
        "threshold": scale * threshold,
    }
    sae = load_sae(write_gemma(tmp_path, **folded))
    rows = torch.from_numpy(x)
    f = sae.encode(rows)
    assert torch.equal(f > 0, torch.from_numpy(trained > 0))
    want = torch.from_numpy(scale * trained).float()
    torch.testing.assert_close(f, want, rtol=1e-5, atol=1e-3)
    rebuilt = torch.from_numpy(scale * (trained @ w_dec + b_dec)).float()
    torch.testing.assert_close(sae.decode(f), rebuilt, rtol=1e-5, atol=1e-3)
    # Dividing the rows by their RMS instead, against biases that do not move, is another function.
    rms = rows / rows.square().mean(dim=1, keepdim=True).sqrt()
    assert not torch.equal(sae.encode(rms) > 0, f > 0)


def test_an_archive_member_that_leads_out_is_refused_and_not_written(tmp_path: Path) -> None:
    folder = write_gemma(tmp_path / "sae")
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        archive.writestr("../../out.npy", (folder / "params.npz").read_bytes())
    with pytest.raises(SAEError):
        load_sae(folder)
    assert not list(tmp_path.rglob("out*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def corrupt(path: Path) -> None:
    """Flip bytes inside W_enc; the archive's directory stays whole."""
    content = bytearray(path.read_bytes())
    content[1000:1016] = bytes(16)
    path.write_bytes(content)


def not_npy(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", b"hello, world")


@pytest.mark.parametrize(
    "damage", [truncate, corrupt, not_npy, Path.touch, lambda p: p.write_text("")]
)
def test_damaged_npz_files_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = write_gemma(tmp_path) / "params.npz"
    if damage is Path.touch:
        path.unlink()
    damage(path)
    with pytest.raises(SAEError, match=r"truncated or not an npz file .*; download it again"):
        load_sae(tmp_path)


# --- What is not an SAE at all --------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["sae.pt", "sae.PTH", "pytorch_model.bin", "sae.pkl"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for given in (tmp_path, tmp_path / name, f"hf://org/repo/{name}"):
        with pytest.raises(SAEError, match=rf"is a pickle \({name}\), and pickles can run code"):
            load_sae(given)


def test_a_pickle_named_npz_is_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SAEError, match="not an npz file"):
        load_sae(tmp_path)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/sae", "x" * 5000, "/dev/null"])
def test_a_path_that_cannot_be_looked_at_is_refused(path: str) -> None:
    with pytest.raises(SAEError, match=r"cannot be looked at .*; give a folder|is not an SAE"):
        load_sae(path)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="nowhere does not exist; give a folder, a file, or hf://"):
        load_sae(tmp_path / "nowhere")


def test_another_folder_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="is not an SAE: it holds nothing; give a folder with"):
        load_sae(tmp_path)
    for number in range(10):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(SAEError, match=r"it holds 0.txt, .*, 7.txt, …; give .*params.npz \(gemma"):
        load_sae(tmp_path)
    with pytest.raises(SAEError, match=r"3\.txt is not an SAE: it holds 3\.txt;"):
        load_sae(tmp_path / "3.txt")


def test_a_revision_of_a_local_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match=r"revision 'main' was given for .* which is a local path"):
        load_sae(tmp_path, revision="main")
