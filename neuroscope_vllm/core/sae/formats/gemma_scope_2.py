"""Gemma Scope 2 (google/gemma-scope-2-*, of Gemma 3): `params.safetensors`, mostly + `config.json`.

Parameters take their input raw, with b_dec folded into the encoder, as Gemma Scope's do (its
report, 3.1). What an SAE reads is in the configuration as a name in transformers, and in the name
of the folder as `resid_post`, `attn_out`, `mlp_out` or `transcoder`; the layer is in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.canonical import neuronpedia_id
from neuroscope_vllm.core.sae.formats.base import (
    Description,
    Located,
    Reader,
    check_headers,
)
from neuroscope_vllm.core.sae.formats.files import (
    open_safetensors,
    place_of,
    read_json,
    read_tensor,
    refuse_settings,
    safetensors_headers,
    text,
)
from neuroscope_vllm.core.sae.info import RESID_POST, SAEInfo

_WEIGHTS = "params.safetensors"
_OURS = {"w_enc": "W_enc", "w_dec": "W_dec"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_REPO = re.compile(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)")
_FOLDER = re.compile(
    r"(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d+)_width_(\w+?)_l0_(\w+)"
)
_MLP_OUT = "model.layers.{}.post_feedforward_layernorm.output"
_READS = {
    "resid_post": "model.layers.{}.output",
    "attn_out": "model.layers.{}.self_attn.o_proj.input",
    "mlp_out": _MLP_OUT,
    "transcoder": "model.layers.{}.pre_feedforward_layernorm.output",
}


def read_info(found: Located) -> Description:
    """Check the configuration, where there is one, and the headers of the weights.

    Raises:
        SAEError: Corrupt, malformed, no JumpReLU, or a cross-layer coder.
    """
    where = PurePath(found.source).as_posix()
    if match := re.search(r"/(clt|crosscoder)", where):
        raise SAEError(
            f"SAE {found.source} is a {match[1]}, which spans layers; choose one of resid_post."
        )
    config = read_json(found, "config.json") if "config.json" in found.paths else {}
    refuse_settings(found, {"architecture": (config.get("architecture"), "jump_relu")})
    layer, hook_point, output_point = _place(found, config, _FOLDER.search(where))
    with open_safetensors(found, _WEIGHTS) as file:
        headers = {_OURS.get(name, name): h for name, h in safetensors_headers(file).items()}
    d_model, width = check_headers(found, headers, "jumprelu")
    repo = _REPO.search(where)
    info = SAEInfo(
        source=found.source,
        revision=found.revision,
        format="gemma-scope-2",
        architecture="jumprelu",
        d_model=d_model,
        width=width,
        layer=layer,
        hook_point=hook_point,
        model_name=text(found, config, "model_name")
        or (f"gemma-3-{repo[1]}-{repo[2]}" if repo else None),
        neuronpedia_id=neuronpedia_id(where),
        output_point=output_point,
    )
    return Description(info)


@contextmanager
def open_tensors(found: Located) -> Iterator[Reader]:
    """A function that reads one tensor by name."""
    with open_safetensors(found, _WEIGHTS) as file:
        yield lambda name: read_tensor(file, _THEIRS.get(name, name))


def _place(
    found: Located, config: dict[str, Any], folder: re.Match[str] | None
) -> tuple[int | None, str, str | None]:
    """(layer, hook point, output point); the configuration before the folder's name."""
    reads = text(found, config, "hf_hook_point_in")
    writes = text(found, config, "hf_hook_point_out")
    if folder is not None:
        reads = reads or _READS[folder[1]].format(folder[2])
        writes = writes or (_MLP_OUT.format(folder[2]) if folder[1] == "transcoder" else None)
    layer, hook_point = (None, RESID_POST) if reads is None else place_of(reads)
    return layer, hook_point, None if writes == reads else writes
