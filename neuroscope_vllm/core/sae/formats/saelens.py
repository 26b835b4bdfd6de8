"""SAELens: `cfg.json` + `sae_weights.safetensors`, as its `save_model` writes them.

Names from before SAELens 6 are read where they map one to one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.formats.base import (
    JUMPRELU_TENSORS,
    RELU_TENSORS,
    Description,
    Header,
    Located,
    check_headers,
)
from neuroscope_vllm.core.sae.info import SAEInfo

_TENSORS = {"standard": RELU_TENSORS, "jumprelu": JUMPRELU_TENSORS}
_RESID_POST = re.compile(r"blocks\.(\d+)\.hook_resid_post|(?:model\.)?layers\.(\d+)(?:\.output)?")
_RESID_PRE = re.compile(r"blocks\.([1-9]\d*)\.hook_resid_pre")


def read_info(found: Located) -> Description:
    """Check the configuration and the headers of the weights.

    Raises:
        SAEError: Corrupt, malformed, or an architecture, transform or hook point not served.
    """
    config = _read_config(found)
    architecture = config.get("architecture", "standard")
    if architecture not in _TENSORS:
        raise SAEError(
            f"SAE {found.source} has architecture {architecture!r}; choose one of "
            f"{' or '.join(_TENSORS)} (SAELens saves a trained batchtopk as jumprelu)."
        )
    _refuse_transforms(found, config)
    d_model, width = check_headers(found, _headers(found), _TENSORS[architecture])
    metadata = config.get("metadata") or config
    info = SAEInfo(
        source=found.source,
        revision=found.revision,
        format="saelens",
        architecture=architecture,
        d_model=d_model,
        width=width,
        layer=_layer(found, config),
        model_name=metadata.get("model_name"),
        neuronpedia_id=metadata.get("neuronpedia_id"),
    )
    return Description(info, subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)))


@contextmanager
def open_tensors(found: Located) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one tensor by name."""
    with _open(found) as file:
        # Cloned: a tensor over the file's own pages would die with a file that is replaced.
        yield lambda name: file.get_tensor(name).clone()


def _read_config(found: Located) -> dict[str, Any]:
    try:
        config = json.loads(found.paths["cfg.json"].read_bytes())
    except (ValueError, OSError) as error:
        raise SAEError(
            f"SAE {found.source} has a cfg.json that is not JSON ({error}); export it again."
        ) from error
    if not isinstance(config, dict):
        raise SAEError(
            f"SAE {found.source} has a cfg.json that is not a JSON object; export it again."
        )
    return config


def _refuse_transforms(found: Located, config: dict[str, Any]) -> None:
    """Refuse what changes the input or the output and is not in the tensors."""
    normalize = config.get("normalize_activations") or "none"
    if normalize in (True, "expected_average_only_in"):  # True: before SAELens 4
        raise SAEError(
            f"SAE {found.source} has normalize_activations='expected_average_only_in' but its "
            f"files lack the scaling factor; fold it in with SAELens' "
            f"fold_activation_norm_scaling_factor and save it again."
        )
    asked = {
        "normalize_activations": (normalize, "none"),
        "reshape_activations": (config.get("reshape_activations", "none"), "none"),
        "activation_fn": (config.get("activation_fn") or config.get("activation_fn_str"), "relu"),
    }
    for name, (value, served) in asked.items():
        if value not in (None, served):
            raise SAEError(
                f"SAE {found.source} has {name}={value!r}, which is not served; choose one with "
                f"{served!r}."
            )


def _layer(found: Located, config: dict[str, Any]) -> int | None:
    metadata = config.get("metadata") or {}
    hook = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point")
    if hook is None:
        layer = config.get("hook_layer", config.get("hook_point_layer"))
        return None if layer is None else int(layer)
    if match := _RESID_POST.fullmatch(hook):
        return int(match[1] or match[2])
    if match := _RESID_PRE.fullmatch(hook):
        return int(match[1]) - 1  # the stream before layer L is the stream after L - 1
    raise SAEError(
        f"SAE {found.source} reads {hook!r}; choose one that reads the residual stream after a "
        f"layer (blocks.L.hook_resid_post)."
    )


def _headers(found: Located) -> dict[str, Header]:
    headers = {}
    with _open(found) as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
            part = file.get_slice(name)
            dtype = str(part.get_dtype())
            headers[name] = Header(tuple(part.get_shape()), dtype, dtype.startswith(("F", "BF")))
        # SAELens before 6 wrote it with every model, as ones unless it had been finetuned.
        if "scaling_factor" in headers:
            if not bool((file.get_tensor("scaling_factor") == 1).all()):
                raise SAEError(
                    f"SAE {found.source} has a finetuned scaling_factor; fold it into W_dec and "
                    f"save it again."
                )
            del headers["scaling_factor"]
    return headers


@contextmanager
def _open(found: Located) -> Iterator[Any]:
    try:
        with safe_open(str(found.paths["sae_weights.safetensors"]), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SAEError(
            f"SAE {found.source} has truncated or corrupt weights ({error}); download it again."
        ) from error
