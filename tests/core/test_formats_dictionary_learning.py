"""dictionary_learning, against its own classes, loaded as it loads them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
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
    publisher,
    random_tensors,
    rows,
)

LINEAR = {
    "encoder.weight": (WIDTH, D_MODEL),
    "encoder.bias": (WIDTH,),
    "decoder.weight": (D_MODEL, WIDTH),
}
PLAIN = {
    "W_enc": (D_MODEL, WIDTH),
    "b_enc": (WIDTH,),
    "W_dec": (WIDTH, D_MODEL),
    "b_dec": (D_MODEL,),
}
GATE = dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (WIDTH,))
ONE_THRESHOLD = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
GROUPS = [16, 48]


class Kind(NamedTuple):
    """A class: its module, our name for what it computes, and its state."""

    module: str
    architecture: str
    shapes: dict[str, tuple[int, ...]]
    buffers: dict[str, Tensor] = {}  # noqa: RUF012
    settings: dict[str, Any] = {}  # noqa: RUF012


CLASSES = {
    "AutoEncoder": Kind("dictionary", "standard", LINEAR | {"bias": (D_MODEL,)}),
    "AutoEncoderNew": Kind("dictionary", "standard", LINEAR | {"decoder.bias": (D_MODEL,)}),
    "GatedAutoEncoder": Kind(
        "dictionary",
        "gated",
        {name: shape for name, shape in LINEAR.items() if name != "encoder.bias"}
        | {"decoder_bias": (D_MODEL,)}
        | GATE,
    ),
    "JumpReluAutoEncoder": Kind("dictionary", "jumprelu", PLAIN | {"threshold": (WIDTH,)}),
    "AutoEncoderTopK": Kind(
        "trainers.top_k", "topk", LINEAR | {"b_dec": (D_MODEL,)}, ONE_THRESHOLD, {"k": K}
    ),
    "BatchTopKSAE": Kind(
        "trainers.batch_top_k", "jumprelu", LINEAR | {"b_dec": (D_MODEL,)}, ONE_THRESHOLD, {"k": K}
    ),
    "MatryoshkaBatchTopKSAE": Kind(
        "trainers.matryoshka_batch_top_k",
        "jumprelu",
        PLAIN,
        ONE_THRESHOLD | {"group_sizes": torch.tensor(GROUPS)},
        {"k": K, "group_sizes": GROUPS},
    ),
}


def write(folder: Path, name: str = "BatchTopKSAE") -> dict[str, Tensor]:
    """Files as its trainers write them, with random parameters; returns the state."""
    kind = CLASSES[name]
    state = random_tensors(kind.shapes) | kind.buffers
    torch.save(state, folder / "ae.pt")
    trainer = {
        "dict_class": name,
        "layer": 12,
        "lm_name": "google/gemma-2-2b",
        "submodule_name": "resid_post_layer_12",
        "k": kind.settings.get("k"),
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return state


def edit_trainer(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    edit_json(path, trainer=json.loads(path.read_text())["trainer"] | changes)


def edit_state(folder: Path, **changes: object) -> None:
    state = torch.load(folder / "ae.pt", weights_only=True) | changes
    torch.save({name: t for name, t in state.items() if t is not None}, folder / "ae.pt")


@pytest.mark.parametrize("name", CLASSES)
def test_encodes_and_decodes_as_its_own_class_does(tmp_path: Path, name: str) -> None:
    state, kind = write(tmp_path, name), CLASSES[name]
    module = publisher(f"dictionary_learning.{kind.module}")
    theirs = getattr(module, name)(D_MODEL, WIDTH, **kind.settings)
    theirs.load_state_dict(state)
    if name == "AutoEncoder":  # what its from_pretrained does by default
        theirs.normalize_decoder()
    ours, x = load_sae(tmp_path), rows()
    f = ours.encode(x)
    assert 0 < (f > 0).float().mean() < 1
    with torch.no_grad():
        assert_same(f, theirs.encode(x))
        assert_same(ours.decode(f), theirs.decode(theirs.encode(x)))


@pytest.mark.parametrize("name", CLASSES)
def test_its_configuration_says_what_it_is(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    info = read_sae_info(tmp_path)
    assert info == load_sae(tmp_path).info
    assert (info.format, info.architecture) == ("dictionary-learning", CLASSES[name].architecture)
    assert (info.layer, info.hook_point, info.width) == (12, "resid_post", WIDTH)
    assert (info.d_model, info.model_name) == (D_MODEL, "google/gemma-2-2b")
    assert info.k == (K if name == "AutoEncoderTopK" else None)
    assert load_sae(tmp_path / "ae.pt").width == WIDTH


def test_a_threshold_is_strict_and_one_for_all(tmp_path: Path) -> None:
    write(tmp_path)
    eye = torch.zeros(WIDTH, D_MODEL)
    eye[:D_MODEL] = torch.eye(D_MODEL)
    edit_state(
        tmp_path,
        **{
            "encoder.weight": eye,
            "encoder.bias": torch.zeros(WIDTH),
            "b_dec": torch.zeros(D_MODEL),
            "threshold": torch.tensor(0.5),
        },
    )
    sae = load_sae(tmp_path)
    x = torch.zeros(1, D_MODEL)
    x[0, :4] = torch.tensor([0.5, 0.75, -0.0, -3.0])
    f = sae.encode(x)
    assert f[0, :4].tolist() == [0.0, 0.75, 0.0, 0.0]
    assert not torch.signbit(f).any()
    assert sae.threshold.tolist() == [0.5] * WIDTH


def test_another_module_is_recorded_and_not_served(tmp_path: Path) -> None:
    write(tmp_path)
    edit_trainer(tmp_path, submodule_name="mlp_out_layer_12")
    info = read_sae_info(tmp_path)
    assert (info.layer, info.hook_point) == (12, "mlp_out_layer_12")
    with pytest.raises(SAEError, match="reads mlp_out_layer_12, but a server hooks only"):
        check_served(info)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize(
    "save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))]
)
def test_a_pickle_of_more_than_tensors_is_never_run(tmp_path: Path, save: Any) -> None:
    write(tmp_path)
    save({"encoder.weight": Bomb()}, tmp_path / "ae.pt")
    for read in (load_sae, read_sae_info):
        with pytest.raises(
            SAEError, match=r"is a pickle of more than tensors \(ae.pt\), and pickles"
        ):
            read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dict_class": "IdentityDict"}, "dict_class 'IdentityDict' in its config.json; choose"),
        ({"dict_class": ["x"]}, r"dict_class=\['x'\] in its configuration, which must be text"),
        ({"k": 5.0}, "k=5.0 in its configuration, which must be a whole number"),
        ({"layer": "12"}, "layer='12' in its configuration, which must be a whole number"),
        ({"layer": True}, "layer=True in its configuration, which must be a whole number"),
        ({"lm_name": 3}, "lm_name=3 in its configuration, which must be text"),
        ({"submodule_name": {}}, "submodule_name={} in its configuration, which must be text"),
        ({"activation_dim": 999}, "activation_dim=999 in its configuration but tensors of 16"),
        ({"dict_size": 999}, "dict_size=999 in its configuration but tensors of 64; give"),
        ({"k": 6}, "k=5 in ae.pt but k=6 in config.json; give files that belong together"),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    write(tmp_path)
    edit_trainer(tmp_path, **changes)
    with pytest.raises(SAEError, match=says):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder.bias": None}, "lacks b_enc"),
        ({"W_skip": torch.zeros(2)}, "holds W_skip besides"),
        ({"b_dec": torch.zeros(3)}, r"b_dec of shape \[3\]"),
        ({"b_dec": torch.zeros(D_MODEL, dtype=torch.int64)}, "stores b_dec as int64"),
        ({"b_dec": torch.full((D_MODEL,), float("nan"))}, "NaN or infinity in b_dec"),
        ({"encoder.weight": torch.zeros(3)}, r"W_enc of shape \[3\]"),
        ({"k": torch.zeros(3)}, r"k=\[0.0, 0.0, 0.0\] in ae.pt"),
        ({"k": "five"}, "not a state_dict of tensors"),
        ({"b_dec": torch.zeros(())}, r"b_dec of shape \[\]"),
        ({"b_dec": torch.zeros(D_MODEL, dtype=torch.complex64)}, "stores b_dec as complex64"),
        ({"b_dec": torch.zeros(D_MODEL).to(torch.float8_e4m3fn)}, "stores b_dec as float8_e4m3fn"),
        ({"b_dec": torch.zeros(D_MODEL, device="meta")}, "has b_dec in its ae.pt as no plain"),
        ({"b_dec": torch.zeros(1).expand(D_MODEL)}, "has b_dec in its ae.pt as no plain tensor"),
        ({"W_skip": torch.zeros(1).expand(2**40, 64)}, "has W_skip in its ae.pt as no plain"),
    ],
)
def test_tensors_that_are_not_this_class_are_refused(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    write(tmp_path)
    edit_state(tmp_path, **changes)
    with pytest.raises(SAEError, match=says):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        Tensor.to_sparse,
        lambda t: t.expand(2, -1).to_sparse_csr(),
        lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.qint8),
        lambda t: torch.nested.nested_tensor([t, t[:3]]),
        lambda t: torch.nested.nested_tensor([t, t[:3]], layout=torch.jagged),
    ],
    ids=["sparse", "csr", "quantized", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore")  # torch's, of kinds that are in beta
def test_tensors_that_are_not_dense_are_refused(
    tmp_path: Path, make: Callable[[Tensor], Tensor]
) -> None:
    write(tmp_path)
    edit_state(tmp_path, b_dec=make(torch.ones(D_MODEL)))
    for read in (load_sae, read_sae_info):
        with pytest.raises(
            SAEError,
            match=r"has (b_dec|a tensor) in its ae\.pt as no plain tensor",
        ):
            read(tmp_path)


@pytest.mark.parametrize("read", [load_sae, read_sae_info])
def test_a_key_that_is_no_name_is_refused(tmp_path: Path, read: Any) -> None:
    state: dict[Any, Tensor] = {**write(tmp_path), 3: torch.zeros(2)}
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(SAEError, match="not a state_dict of tensors"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["AutoEncoder", "GatedAutoEncoder"])
def test_parameters_and_tied_weights_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    """Folding works in place: not on a leaf of autograd, and not on one memory twice."""
    state = write(tmp_path, name)
    state["decoder.weight"] = state["encoder.weight"].clone().t()
    torch.save({name: t.clone() for name, t in state.items()}, tmp_path / "ae.pt")
    want = load_sae(tmp_path)
    weight = torch.nn.Parameter(state["encoder.weight"])
    torch.save(
        state | {"encoder.weight": weight, "decoder.weight": weight.t().detach()},
        tmp_path / "ae.pt",
    )
    ours = load_sae(tmp_path)
    assert torch.equal(ours.encode(rows()), want.encode(rows()))
    assert torch.equal(ours.W_dec, want.W_dec)
    assert not ours.W_enc.requires_grad


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x80\x02."])
def test_damaged_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "ae.pt").write_bytes(content)
    with pytest.raises(SAEError):
        load_sae(tmp_path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "ae.pt"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(SAEError, match="truncated or corrupt weights"):
        load_sae(tmp_path)
