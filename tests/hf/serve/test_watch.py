"""What a device may lack: MPS has no float64, and some operations in no PyTorch yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.steering.catalogue import Catalogue, Operator
from neuroscope_vllm.core.steering.settle import settle
from neuroscope_vllm.core.steering.spec import Edit, SteeringSpec
from neuroscope_vllm.engine.hf.loading import load_whole
from neuroscope_vllm.engine.hf.serve import watch as watching
from neuroscope_vllm.engine.hf.serve.watch import ModelWatch
from neuroscope_vllm.engine.serving.sites import BuiltSite, SiteSettings, find_sites, load

LAYER = 20
MPS = torch.device("mps")


@pytest.fixture(scope="module")
def settings(tiny_sae: Path) -> Settings:
    return Settings(sae=[str(tiny_sae)])


@pytest.fixture(scope="module")
def sites(settings: Settings) -> list[SiteSettings]:
    return find_sites(settings, "tiny", d_model=64, num_layers=26)[0]


def broken(how: str) -> Callable[..., BuiltSite]:
    """Sites whose encoders do as a device that is not here might."""

    def build(site: SiteSettings, sae: Any, settings: Settings, *, device: Any, dtype: Any) -> Any:
        built = BuiltSite(site, sae, settings, device=torch.device("cpu"), dtype=dtype)
        if device != MPS:
            return built
        encode = built.encoder.encode

        def other(rows: torch.Tensor) -> torch.Tensor:
            if how == "lacks an operation":
                raise NotImplementedError("The operator 'aten::topk' is not implemented for MPS")
            if how == "lacks float64":
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            found = encode(rows)
            return found.roll(1, 1) if how == "is wrong" else found

        built.encoder = SimpleNamespace(encode=other, topk=built.encoder.topk)  # type: ignore[assignment]
        return built

    return build


@pytest.mark.parametrize("how", ["lacks an operation", "lacks float64", "is wrong", "is right"])
def test_what_a_device_can_not_encode_the_cpu_does(
    how: str, settings: Settings, sites: list[SiteSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "BuiltSite", broken(how))
    watch: Any = SimpleNamespace(_device=MPS, note=None)
    saes = {LAYER: load(sites[0], settings)}
    _, encode_on = ModelWatch._build(watch, sites, saes, settings, {LAYER: torch.float32})
    if how == "is right":
        assert (encode_on, watch.note) == (MPS, None)
    else:
        assert encode_on.type == "cpu"
        assert "encoded on the CPU" in watch.note


class NoFloat64(TorchDispatchMode):
    """As MPS: not even for a moment."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                assert one.dtype != torch.float64, func
        return found


def test_no_step_needs_float64(
    tiny_llama: Path, settings: Settings, sites: list[SiteSettings]
) -> None:
    sent: list[Any] = []
    whole, _ = load_whole(str(tiny_llama))
    watch = ModelWatch(
        whole,
        "tiny",
        sites,
        settings,
        Operator(),
        max_rows=64,
        send=sent.append,
        stop=lambda name, rule: None,
        engine="e",
    )
    known = Catalogue(find_sites(settings, "tiny", d_model=64, num_layers=26)[1])
    edits = [Edit(op="ablate", feature=3), Edit(op="scale", feature=9, value=2.0)]
    steering = settle(SteeringSpec(steer=edits), known)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), NoFloat64():
        with watch.sequence("a", steering, 4, before=lambda: None, logits=True):
            whole(input_ids=ids)
        assert watch.logits is None
    assert [span.internal_id for span in sent[0].spans] == ["a"]
    assert sent[0].steered[0].features == [3, 9]
    assert not watch.pipeline.failing
