"""SAELens: `cfg.json` + `sae_weights.safetensors`, as its `save_model` writes them.

Names from before SAELens 6 are read where they map one to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.formats.base import (
    Description,
    Header,
    Located,
    Reader,
    check_headers,
    check_k,
)
from neuroscope_vllm.core.sae.formats.files import (
    open_safetensors,
    place_of,
    read_json,
    read_tensor,
    refuse_settings,
    safetensors_headers,
    section,
    text,
)
from neuroscope_vllm.core.sae.info import RESID_POST, SAEInfo

_WEIGHTS = "sae_weights.safetensors"
_ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
_BY_ROW = ("constant_norm_rescale", "layer_norm")
# Scales of the training data that SAELens folds into the weights when training ends.
_FOLDED_AT_THE_END = {
    "expected_average_only_in": "fold_activation_norm_scaling_factor",
    "covariance_whitening": "fold_activation_whitening",
}


def read_info(found: Located) -> Description:
    """Check the configuration and the headers of the weights.

    Raises:
        SAEError: Corrupt, malformed, or an architecture or transform not served.
    """
    config = read_json(found, "cfg.json")
    architecture = _architecture(found, config)
    metadata = section(found, config, "metadata") or config
    layer, hook_point = _place(found, config)
    input_norm = _input_norm(found, config)
    _refuse_rest(found, config, architecture, hook_point)
    d_model, width = check_headers(found, _headers(found), architecture)
    info = SAEInfo(
        source=found.source,
        revision=found.revision,
        format="saelens",
        architecture=architecture,
        d_model=d_model,
        width=width,
        layer=layer,
        hook_point=hook_point,
        model_name=text(found, metadata, "model_name"),
        neuronpedia_id=text(found, metadata, "neuronpedia_id"),
        k=check_k(found, _k(found, config), width) if architecture == "topk" else None,
        input_norm=input_norm,
    )
    return Description(
        info,
        subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        unit_decoder=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
    )


@contextmanager
def open_tensors(found: Located) -> Iterator[Reader]:
    """A function that reads one tensor by name."""
    with open_safetensors(found, _WEIGHTS) as file:
        yield lambda name: read_tensor(file, name)


def _architecture(found: Located, config: dict[str, Any]) -> str:
    architecture = config.get("architecture", "standard")
    if architecture == "standard" and _activation(config) == "topk":
        architecture = "topk"  # before SAELens 6
    if architecture not in _ARCHITECTURES:
        raise SAEError(
            f"SAE {found.source} has architecture {architecture!r}; choose one of "
            f"{', '.join(_ARCHITECTURES)} (SAELens saves a trained batchtopk as jumprelu)."
        )
    return architecture


def _activation(config: dict[str, Any]) -> str | None:
    return config.get("activation_fn") or config.get("activation_fn_str")


def _k(found: Located, config: dict[str, Any]) -> Any:
    return config.get("k", section(found, config, "activation_fn_kwargs").get("k"))


def _place(found: Located, config: dict[str, Any]) -> tuple[int | None, str]:
    hook = (
        text(found, section(found, config, "metadata"), "hook_name")
        or text(found, config, "hook_name")
        or text(found, config, "hook_point")
    )
    if hook is not None:
        return place_of(hook)
    layer = config.get("hook_layer", config.get("hook_point_layer"))
    return (layer if isinstance(layer, int) else None), RESID_POST


def _input_norm(found: Located, config: dict[str, Any]) -> str | None:
    """The normalisation that belongs to encoding; None where the tensors need none."""
    normalize = config.get("normalize_activations") or "none"
    if normalize is True:  # before SAELens 4
        normalize = "expected_average_only_in"
    if fold := _FOLDED_AT_THE_END.get(str(normalize)):
        raise SAEError(
            f"SAE {found.source} has normalize_activations={normalize!r} but its files lack the "
            f"scaling factor; fold it in with SAELens' {fold} and save it again."
        )
    if normalize in _BY_ROW:
        return normalize
    refuse_settings(found, {"normalize_activations": (normalize, "none")})
    return None


def _refuse_rest(
    found: Located, config: dict[str, Any], architecture: str, hook_point: str
) -> None:
    """Refuse what changes the input or the output and is not in the tensors."""
    reshape = config.get("reshape_activations", "none")
    if hook_point.endswith(".hook_z") and reshape == "hook_z":
        reshape = "none"  # heads side by side, which is how rows of d_model come
    activation = _activation(config)
    refuse_settings(
        found,
        {
            "reshape_activations": (reshape, "none"),
            "activation_fn": (
                None if (architecture, activation) == ("topk", "topk") else activation,
                "relu",
            ),
        },
    )


def _headers(found: Located) -> dict[str, Header]:
    with open_safetensors(found, _WEIGHTS) as file:
        headers = safetensors_headers(file)
        # SAELens before 6 wrote it with every model, as ones unless it had been finetuned.
        if "scaling_factor" in headers:
            if not bool((file.get_tensor("scaling_factor") == 1).all()):
                raise SAEError(
                    f"SAE {found.source} has a finetuned scaling_factor; fold it into W_dec and "
                    f"save it again."
                )
            del headers["scaling_factor"]
    return headers
