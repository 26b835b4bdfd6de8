"""EleutherAI sparsify: `cfg.json` + `sae.safetensors`, in a folder named as the module it reads.

Follows sparsify's own `sparse_coder.py`: the encoder takes `x - b_dec` unless it is a transcoder,
and W_dec is stored by feature. (SAELens' loader of this format differs from it in both.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from torch import Tensor

from neuroscope_vllm.core.sae.formats.base import (
    Description,
    Header,
    Located,
    Reader,
    check_headers,
    check_k,
)
from neuroscope_vllm.core.sae.formats.files import (
    check_sizes,
    flag,
    integer,
    open_safetensors,
    place_of,
    read_json,
    read_tensor,
    refuse_settings,
    safetensors_headers,
    transposed,
)
from neuroscope_vllm.core.sae.info import RESID_POST, SAEInfo

_WEIGHTS = "sae.safetensors"
_OURS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_MODULE = re.compile(r"(?:^|[/@])((?:\w+\.)*layers\.\d+(?:\.\w+)*)(?:/(?:cfg\.json|sae\.\w+))?/?$")


def read_info(found: Located) -> Description:
    """Check the configuration and the headers of the weights.

    Raises:
        SAEError: Corrupt, malformed, or not a top-k autoencoder.
    """
    config = read_json(found, "cfg.json")
    refuse_settings(
        found,
        {
            "activation": (config.get("activation"), "topk"),
            "signed": (config.get("signed"), False),
            "skip_connection": (config.get("skip_connection"), False),
        },
    )
    d_model, width = check_headers(found, _headers(found), "topk")
    check_sizes(found, config, {"d_in": d_model})
    if integer(found, config, "num_latents"):  # 0: as many as expansion_factor says
        check_sizes(found, config, {"num_latents": width})
    elif factor := integer(found, config, "expansion_factor"):
        check_sizes(
            found, {"expansion_factor * d_in": factor * d_model}, {"expansion_factor * d_in": width}
        )
    transcodes = flag(found, config, "transcode", default=False)
    layer, hook_point, output_point = _place(found, transcodes)
    info = SAEInfo(
        source=found.source,
        revision=found.revision,
        format="sparsify",
        architecture="topk",
        d_model=d_model,
        width=width,
        layer=layer,
        hook_point=hook_point,
        k=check_k(found, config.get("k"), width),
        output_point=output_point,
    )
    return Description(info, subtract_b_dec=not transcodes)


@contextmanager
def open_tensors(found: Located) -> Iterator[Reader]:
    """A function that reads one tensor by name."""
    with open_safetensors(found, _WEIGHTS) as file:

        def read(name: str) -> Tensor:
            tensor = read_tensor(file, _THEIRS.get(name, name))
            return tensor.t() if name == "W_enc" else tensor

        yield read


def _place(found: Located, transcodes: bool) -> tuple[int | None, str, str | None]:
    """(layer, hook point, output point) by the folder's name, `layers.10` or `layers.10.mlp`."""
    match = _MODULE.search(PurePath(found.source).as_posix())
    if transcodes:
        module = match[1] if match else "module"
        return place_of(module)[0], f"{module}.input", f"{module}.output"
    return (None, RESID_POST, None) if match is None else (*place_of(match[1]), None)


def _headers(found: Located) -> dict[str, Header]:
    with open_safetensors(found, _WEIGHTS) as file:
        headers = {_OURS.get(name, name): h for name, h in safetensors_headers(file).items()}
    if "W_enc" in headers:
        headers["W_enc"] = transposed(headers["W_enc"])
    return headers
