"""What is asked of steering comes to what is meant, or is refused by the field's name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.request import RequestOptions, request_options
from neuroscope_vllm.core.sae.info import LAYER_NORM, RMS, SAEInfo
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.steering.arithmetic import activations, change, feature_vector
from neuroscope_vllm.core.steering.catalogue import Catalogue, Operator, Site
from neuroscope_vllm.core.steering.settle import SteeringRefused, settle
from neuroscope_vllm.core.steering.settled import MAX_RULES, MAX_SLOTS, Steering, from_dict
from neuroscope_vllm.core.steering.spec import Edit, Rule, SteeringSpec

WIDTH, D_MODEL = 32, 8


def site(*, calibrated: bool = True, gates: bool = True) -> Site:
    return Site(
        source="sae",
        norm=np.full(WIDTH, 2.0, np.float32),
        gain=np.where(np.arange(WIDTH) == 31, 0.5, 1).astype(np.float32),
        maximum=np.arange(WIDTH, dtype=np.float32) if calibrated else None,
        median_norm=100.0 if calibrated else None,
        gates=gates,
    )


CATALOGUE = Catalogue({5: site(calibrated=False), 20: site()})


def one(edit: dict[str, Any], catalogue: Catalogue = CATALOGUE) -> Steering:
    given = {"layer": 20, "feature": 3, **edit}
    found = settle(msgspec.convert({"steer": [given]}, SteeringSpec), catalogue)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("edit", "per_activation", "constant"),
    [
        ({"op": "add", "value": 40}, 0, 40),
        ({"op": "add", "value": -2, "unit": "max"}, 0, -6),
        ({"op": "clamp", "value": 7}, -1, 7),
        ({"op": "clamp", "value": 10, "unit": "max"}, -1, 30),
        ({"op": "scale", "value": 4}, 3, 0),
        ({"op": "ablate"}, -1, 0),
        ({"op": "ablate", "feature": 31}, -2, 0),
    ],
)
def test_edits_are_two_numbers(
    edit: dict[str, Any], per_activation: float, constant: float
) -> None:
    (slot,) = one(edit).slots
    assert (slot.layer, slot.feature) == (20, edit.get("feature", 3))
    assert (slot.per_activation, slot.constant) == (per_activation, constant)


@given(
    st.sampled_from(["add", "clamp", "scale", "ablate"]),
    st.floats(-300, 300),
    st.sampled_from(["all", "prompt", "generated"]),
)
def test_readers_are_told_what_was_asked(op: str, value: float, positions: str) -> None:
    edit = {"op": op, "value": value, "positions": positions}
    if op == "ablate":
        del edit["value"]
    catalogue = Catalogue({20: site()}, Operator(max_dose=1e9))
    steering = one(edit, catalogue)
    assert from_dict(json.loads(json.dumps(steering.to_dict()))) == steering
    (said,) = steering.describe()["edits"]
    assert said["positions"] == positions
    again = one({"op": said["op"], **({"value": said["value"]} if "value" in said else {}),
                 "positions": positions}, catalogue)  # fmt: skip
    assert again.slots[0].constant == pytest.approx(steering.slots[0].constant)
    assert again.slots[0].per_activation == pytest.approx(steering.slots[0].per_activation)


def test_the_dose_is_the_change_over_the_usual_norm() -> None:
    assert one({"op": "add", "value": 40}).doses == {20: 0.8}
    assert one({"op": "add", "value": 40}).warnings == []
    loud = one({"op": "add", "value": 60})
    assert loud.doses == {20: 1.2}
    assert "layer 20 by up to 1.2" in loud.warnings[0]
    assert one({"op": "scale", "value": 21}).doses == {20: 1.2}
    assert one({"op": "ablate"}).doses == {20: 0.0}
    assert one({"op": "ablate", "feature": 31}).doses == {20: 0.62}  # a second time 31 x 2 / 100
    # From its maximum down, or from nothing up.
    assert one({"op": "clamp", "feature": 30, "value": -10}).doses == {20: 0.8}
    assert one({"op": "clamp", "feature": 30, "value": 50}).doses == {20: 1.0}
    assert one({"op": "scale", "value": 0.5}).doses == {20: 0.0}
    with pytest.raises(SteeringRefused, match=r"layer 20 by up to 4\.2 .* limit is 4"):
        one({"op": "add", "value": 210})
    both = [Edit(op="add", layer=20, feature=f, value=110.0) for f in (1, 2)]
    with pytest.raises(SteeringRefused, match="limit"):
        settle(SteeringSpec(steer=both), CATALOGUE)
    # Where nothing is known, nothing is refused for its size but what no float16 holds.
    assert one({"op": "add", "value": 1e6, "layer": 5}).doses == {}
    with pytest.raises(SteeringRefused, match=r"steer\[0\]\.value"):
        one({"op": "add", "value": 1e7, "layer": 5})


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ({"op": "add"}, "value: give a number"),
        ({"op": "add", "value": float("nan")}, "value: nan"),
        ({"op": "add", "value": float("-inf")}, "value: -inf"),
        ({"op": "add", "value": 1, "feature": 32}, "feature: 32 does not exist"),
        ({"op": "add", "value": 1, "feature": None}, "feature: name one, 0 to 31"),
        ({"op": "add", "value": 1, "layer": 7}, "layer: no SAE of layer 7 is served.*5, 20"),
        ({"op": "add", "value": 1, "layer": None}, "layer: say which of layer 5, 20"),
        ({"op": "ablate", "value": 1}, "value: ablate takes none"),
        ({"op": "ablate", "unit": "max"}, "unit: ablate has no value"),
        ({"op": "scale", "value": 1, "unit": "max"}, "unit: scale is a ratio"),
        ({"op": "add", "value": 1, "unit": "max", "layer": 5}, "unit: SAE sae has no calibration"),
        ({"op": "add", "value": 1, "unit": "max", "feature": 0}, "unit: feature 0 never fired"),
        ({"op": "add", "value": 1, "direction": "x"}, "direction: only op direction"),
        ({"op": "direction", "value": 1, "direction": "x"}, "feature: op direction adds no"),
        (
            {"op": "direction", "value": 1, "direction": "x", "feature": None},
            "direction: no direction is",
        ),
    ],
)
def test_refusals_name_the_field(edit: dict[str, Any], why: str) -> None:
    with pytest.raises(SteeringRefused, match=rf"^steer\[0\]\.{why}"):
        one(edit)


def test_a_top_k_sae_gates_nothing() -> None:
    """One feature's activation depends on all the others there."""
    catalogue = Catalogue({20: site(gates=False)})
    assert one({"op": "add", "value": 1}, catalogue).slots[0].writes
    for edit in ({"op": "clamp", "value": 1}, {"op": "ablate"}, {"op": "scale", "value": 2}):
        with pytest.raises(SteeringRefused, match=r"steer\[0\]\.op: SAE sae keeps the k largest"):
            one(edit, catalogue)
    rule = msgspec.convert({"when": {"feature": 1, "above": 1}, "stop": True}, Rule)
    with pytest.raises(SteeringRefused, match=r"rules\[0\]\.when\.feature: SAE sae keeps"):
        settle(SteeringSpec(rules=[rule]), catalogue)


@pytest.mark.parametrize("input_norm", [None, RMS, LAYER_NORM])
@pytest.mark.parametrize("sae_input", ["raw", "rms"])
def test_doses_are_of_the_change_that_is_made(input_norm: str | None, sae_input: str) -> None:
    """Also where activations are in the units of each row's own norm."""
    draw = torch.Generator().manual_seed(4)
    w_enc, w_dec = torch.randn(16, 8, generator=draw), torch.randn(8, 16, generator=draw)
    info = SAEInfo(
        source="s", format="t", architecture="jumprelu", d_model=16, width=8, input_norm=input_norm
    )
    sae = SAE(w_enc, torch.zeros(8), torch.zeros(8), w_dec, torch.zeros(16), info)
    x = torch.randn(4001, 16, generator=draw)
    calibration = Calibration.empty(8)
    calibration.tokens = 1
    calibration.update_norms(x.norm(dim=1))
    catalogue = Catalogue({20: Site.of(sae, calibration, sae_input)}, Operator(max_dose=1e9))
    found = settle(SteeringSpec(steer=[Edit(op="add", feature=5, value=3.0)]), catalogue)
    assert found is not None
    used = sae.reading_rms() if sae_input == "rms" else sae
    vector = feature_vector(used, 5)
    ones = torch.ones(len(x))
    made = change(
        3 * ones, vector.writing.expand_as(x), vector.normed * ones, x, used.info.input_norm
    )
    usual = made.norm(dim=1).median() / x.norm(dim=1).median()
    assert found.doses[20] == pytest.approx(float(usual), rel=0.05)


def test_there_is_room_for_so_many() -> None:
    with pytest.raises(SteeringRefused, match="preset: 1000000 are more than 16"):
        settle(SteeringSpec(preset=["calm"] * 1_000_000), CATALOGUE)
    edits = [Edit(op="ablate", layer=20, feature=f) for f in range(MAX_SLOTS + 1)]
    assert settle(SteeringSpec(steer=edits[1:]), CATALOGUE) is not None
    with pytest.raises(SteeringRefused, match=f"{MAX_SLOTS + 1} edits and conditions on layer 20"):
        settle(SteeringSpec(steer=edits), CATALOGUE)
    rule = msgspec.convert({"when": {"layer": 20, "feature": 1, "above": 1}, "tag": "t"}, Rule)
    assert settle(SteeringSpec(rules=[rule] * MAX_RULES), CATALOGUE) is not None
    with pytest.raises(SteeringRefused, match=f"rules: a request may have {MAX_RULES}"):
        settle(SteeringSpec(rules=[rule] * (MAX_RULES + 1)), CATALOGUE)


def test_what_the_prefix_cache_may_share() -> None:
    add = {"op": "add", "value": 4}
    assert one(add).edits_prompt
    assert not one(add).splits
    assert one({**add, "positions": "prompt"}).splits
    assert one({**add, "positions": "prompt"}).edits_prompt
    assert not one({**add, "positions": "generated"}).edits_prompt
    tag = {"when": {"layer": 20, "feature": 1, "above": 1}, "tag": "t"}
    tagged = settle(msgspec.convert({"rules": [tag]}, SteeringSpec), CATALOGUE)
    assert tagged is not None
    assert not tagged.edits_prompt
    assert not tagged.reads_prompt
    steers = {**tag, "steer": [{"op": "ablate", "layer": 5, "feature": 1}]}
    ruled = settle(msgspec.convert({"rules": [steers]}, SteeringSpec), CATALOGUE)
    assert ruled is not None
    assert not ruled.edits_prompt
    tag["when"]["positions"] = "all"
    reads = settle(msgspec.convert({"rules": [tag]}, SteeringSpec), CATALOGUE)
    assert reads is not None
    assert reads.reads_prompt
    # Equal for those that steer alike, however they wrote it.
    assert one(add).digest == one({"op": "add", "value": 4.0, "unit": "raw"}).digest
    assert one(add).digest != one({**add, "positions": "generated"}).digest
    assert one(add).digest != one({**add, "feature": 4}).digest


def test_under_pipeline_parallelism_rules_stay_on_their_stage() -> None:
    staged = Catalogue({5: site(), 20: site()}, staged=True)
    when = {"layer": 5, "feature": 1, "above": 1}
    ablate = {"op": "ablate", "feature": 1}
    for rule in ({"stop": True}, {"steer": [{**ablate, "layer": 20}]}):
        with pytest.raises(SteeringRefused, match=r"rules\[0\]: under pipeline parallelism"):
            settle(msgspec.convert({"rules": [{"when": when, **rule}]}, SteeringSpec), staged)
    same = {"rules": [{"when": when, "steer": [{**ablate, "layer": 5}], "tag": "t"}]}
    assert settle(msgspec.convert(same, SteeringSpec), staged) is not None


def test_under_speculative_decoding_rules_tag_only() -> None:
    drafts = Catalogue({20: site()}, drafts=True)
    when = {"feature": 1, "above": 1}
    for rule in ({"stop": True}, {"steer": [{"op": "ablate", "feature": 1}]}):
        with pytest.raises(SteeringRefused, match=r"rules\[0\]: under speculative decoding"):
            settle(msgspec.convert({"rules": [{"when": when, **rule}]}, SteeringSpec), drafts)
    tag = {"rules": [{"when": when, "tag": "t"}]}
    assert settle(msgspec.convert(tag, SteeringSpec), drafts) is not None


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    tensors = {"up": torch.full((D_MODEL,), 3.0), "flat": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "vectors.safetensors")
    return tmp_path


def operator(folder: Path, text: str) -> Operator:
    (folder / "steering.yaml").write_text(text)
    return Operator.load(str(folder / "steering.yaml"))


def test_an_operators_file(vectors: Path) -> None:
    found = operator(
        vectors,
        """
        presets:
          calm: [{op: add, layer: 20, feature: 1, value: 2}, {op: ablate, layer: 20, feature: 2}]
        directions:
          up: {file: vectors.safetensors, tensor: up, layer: 5}
        rules:
          - {when: {layer: 20, feature: 4, above: 3}, tag: seen}
        warn_dose: 0.01
        """,
    )
    catalogue = Catalogue.build({5: site(), 20: site()}, found, d_model=D_MODEL)
    assert catalogue.norms["up"] == pytest.approx(3 * D_MODEL**0.5)
    asked = SteeringSpec(preset="calm", steer=[Edit(op="direction", direction="up", value=-0.5)])
    steering = settle(asked, catalogue)
    assert steering is not None
    assert [(s.layer, s.feature, s.direction) for s in steering.slots] == [
        (5, None, "up"), (20, 1, None), (20, 2, None), (20, 4, None),
    ]  # fmt: skip
    assert steering.rules[0].tag == "seen"
    assert len(steering.warnings) == 2
    # The operator's rules are everybody's, also of who asks for nothing.
    everybody = settle(SteeringSpec(), catalogue)
    assert everybody is not None
    assert not any(slot.writes for slot in everybody.slots)
    with pytest.raises(
        SteeringRefused, match=r"preset: no preset is named clam; did you mean calm\?"
    ):
        settle(SteeringSpec(preset="clam"), catalogue)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("presets: 3", "presets"),
        ("preset: {}", "unknown key 'preset'; did you mean presets"),
        ("max_dose: 0", "max_dose must be above 0"),
        ("max_dose: .nan", "max_dose must be above 0"),
        ("directions: {d: {file: none.safetensors, layer: 5}}", "none.safetensors can not be read"),
        ("directions: {d: {file: vectors.safetensors, layer: 5}}", "holds 2 tensors; name one of"),
        ("directions: {d: {file: vectors.safetensors, tensor: x, layer: 5}}", "no tensor x"),
        ("directions: {d: {file: vectors.safetensors, tensor: flat, layer: 5}}", "no vector of"),
        ("directions: {d: {file: vectors.safetensors, tensor: up, layer: 9}}", "is of layer 9"),
        ("directions: {d: {file: steering.yaml, tensor: up, layer: 5}}", "can not be read"),
        ("presets: {a: [{op: up}]}", "Invalid enum value 'up'"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_operators_file_is_refused(vectors: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Catalogue.build({5: site(), 20: site()}, operator(vectors, text), d_model=D_MODEL)


def test_directions_are_of_the_model(vectors: Path) -> None:
    found = operator(vectors, "directions: {d: {file: vectors.safetensors, tensor: up, layer: 5}}")
    with pytest.raises(ConfigError, match="has 8 numbers but this model's residuals have 16"):
        Catalogue.build({5: site()}, found, d_model=16)


def test_a_request_brings_it_in_json() -> None:
    text = '{"steer": [{"op": "ablate", "feature": 3}], "prompt_features": "all"}'
    options = request_options({"neuroscope": text})
    assert options == RequestOptions(steer=[Edit(op="ablate", feature=3)], prompt_features="all")
    assert request_options({"neuroscope": json.loads(text)}) == options
    with pytest.raises(ValueError, match=r"vllm_xargs\.neuroscope: .*steer\[0\]\.op"):
        request_options({"neuroscope": '{"steer": [{"op": "sub"}]}'})


def test_what_is_ablated_is_gone_where_encoder_and_decoder_agree() -> None:
    """w_enc · d = 1: re-encoded, the feature is at 0, or at what it was clamped to."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(WIDTH, D_MODEL, generator=draw), dim=1)
    info = SAEInfo(source="s", format="t", architecture="jumprelu", d_model=D_MODEL, width=WIDTH)
    zeros = torch.zeros
    sae = SAE(rows.t(), zeros(WIDTH), torch.full((WIDTH,), 0.1), rows, zeros(D_MODEL), info)
    x = torch.randn(64, D_MODEL, generator=draw) * 4
    vector = feature_vector(sae, 7)
    reading, writing = vector.reading.expand_as(x), vector.writing.expand_as(x)
    bias, threshold = torch.full((64,), vector.bias), torch.full((64,), vector.threshold)
    f = activations(x, reading, bias, threshold, torch.full((64,), math.inf), None)
    assert f.tolist() == pytest.approx(sae.encode(x)[:, 7].tolist(), abs=1e-5)
    assert (f > 0).sum() > 10
    for value in (0.0, 5.0):
        edited = x + change(value - f, writing, zeros(64), x, None)
        fired = f > 0
        again = sae.encode(edited)[fired, 7].tolist()
        assert again == pytest.approx([value] * len(again), abs=1e-5)
    present = x + change(f - f, writing, zeros(64), x, None)
    assert torch.equal(present, x)


@given(st.floats(0.05, 1.6), st.integers(0, 9))
def test_what_is_ablated_reads_zero_whatever_the_encoder_reads_of_its_decoder(
    gain: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(3, D_MODEL, generator=generator), dim=1)
    across = torch.randn(3, D_MODEL, generator=generator)
    across -= (across * w_dec).sum(1, keepdim=True) * w_dec
    info = SAEInfo(source="s", format="t", architecture="jumprelu", d_model=D_MODEL, width=3)
    bias, threshold = torch.randn(3, generator=generator), torch.full((3,), 0.01)
    w_enc = (gain * w_dec + across).T
    sae = SAE(w_enc, bias, threshold, w_dec, torch.zeros(D_MODEL), info)
    made = Site.of(sae, None)
    assert made.gain.tolist() == pytest.approx([gain] * 3, abs=1e-5)
    (slot,) = one({"op": "ablate", "feature": 1, "layer": 5}, Catalogue({5: made})).slots
    x = 8 * torch.randn(64, D_MODEL, generator=generator)
    f = sae.encode(x)[:, 1]
    assert (f > 0).sum() > 10
    edited = x + (slot.per_activation * f).unsqueeze(1) * w_dec[1]
    assert not sae.encode(edited)[:, 1].any()
    assert slot.per_activation == pytest.approx(-1 if gain >= 1 else -1 / gain, rel=1e-4)


def test_what_no_decoder_vector_ablates_is_refused() -> None:
    blind = Site(**{**msgspec.structs.asdict(site()), "gain": np.zeros(WIDTH, np.float32)})
    with pytest.raises(
        SteeringRefused, match=r"steer\[0\]\.op: the encoder .* use clamp with value 0"
    ):
        one({"op": "ablate"}, Catalogue({20: blind}))
    assert one({"op": "clamp", "value": 0}, Catalogue({20: blind})).slots[0].per_activation == -1


def test_where_others_would_get_steered_keys_and_values_nothing_is_edited() -> None:
    shared = Catalogue({20: site()}, kv_store="LMCacheConnectorV1")
    with pytest.raises(SteeringRefused, match=r"steer: .* through LMCacheConnectorV1"):
        one({"op": "add", "value": 4}, shared)
    tag = {"rules": [{"when": {"feature": 1, "above": 1}, "tag": "t"}]}
    assert settle(msgspec.convert(tag, SteeringSpec), shared) is not None


def test_on_an_attention_sink_no_feature_is_active() -> None:
    rows = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    one, zero = torch.ones(2), torch.zeros(2)
    f = activations(rows, torch.eye(2), zero, zero, torch.tensor([10.0, 10.0]), None)
    assert f.tolist() == [3.0, 0.0]
    assert change(-f, torch.eye(2), zero, rows, None).tolist() == [[-3.0, 0.0], [0.0, 0.0]]
    assert activations(rows, torch.eye(2), zero, zero, 1e9 * one, None).tolist() == [3.0, 40.0]


def test_doses_of_prompt_and_answer_do_not_add_up() -> None:
    def edits(*positions: str) -> SteeringSpec:
        each = [
            {"op": "add", "layer": 20, "feature": 3, "value": 30.0, "positions": p}
            for p in positions
        ]
        return msgspec.convert({"steer": each}, SteeringSpec)

    for where, dose in (
        (("prompt", "generated"), 0.6),
        (("prompt", "prompt"), 1.2),
        (("all", "generated"), 1.2),
        (("all", "prompt", "generated"), 1.2),
    ):
        found = settle(edits(*where), CATALOGUE)
        assert found is not None
        assert found.doses == {20: dose}


def test_a_condition_that_every_token_meets_is_refused() -> None:
    rule = {"when": {"layer": 20, "feature": 3, "above": -0.5}, "tag": "t"}
    with pytest.raises(SteeringRefused, match=r"rules\[0\]\.when\.above: every token meets -0\.5"):
        settle(msgspec.convert({"rules": [rule]}, SteeringSpec), CATALOGUE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steer": "[]"}, "vllm_xargs.steer is nothing we know; did you mean neuroscope"),
        ({"neuroscop": "{}"}, "vllm_xargs.neuroscop is nothing we know"),
        ({"neuroscope": '{"steer": [{"op": "Add"}]}'}, "known are add, clamp, scale, ablate"),
        ({"neuroscope": '{"steer": [{"op": "add", "unit": "sigma"}]}'}, "known are raw, max"),
        ({"neuroscope": '{"steer": [{"op": "add", "zz": 1}]}'}, "zz"),
    ],
)
def test_options_in_the_wrong_place_are_no_unsteered_answer(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        request_options(given)
    assert request_options({"other_plugin": 1, "neuroscope_n": {"n": 2}}) == RequestOptions()


def test_a_change_of_unknown_size_is_said() -> None:
    assert one({"op": "add", "value": 4, "layer": 5}).warnings == [
        "how large the change of layer 5 is, is not known: its SAE has no calibration."
    ]
    tag = {"rules": [{"when": {"layer": 5, "feature": 1, "above": 1}, "tag": "t"}]}
    found = settle(msgspec.convert(tag, SteeringSpec), CATALOGUE)
    assert found is not None
    assert found.warnings == []
