"""SAELens: `cfg.json` + `sae_weights.safetensors`, as its `save_model` writes them.

Names from before SAELens 6 are read where they map one to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.formats.base import (
    FLOATS,
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
    number,
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
# Scales of the training data, which SAELens folds into the weights when training ends; it then
# writes "none". Until then the first is beside the weights, in a checkpoint of its trainer.
_SCALED, _WHITENED = "expected_average_only_in", "covariance_whitening"
_SCALER = "activation_scaler.json"


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
    check_sizes(found, config, {"d_in": d_model, "d_sae": width})
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
        subtract_b_dec=flag(found, config, "apply_b_dec_to_input", default=True),
        unit_decoder=architecture == "topk"
        and flag(found, config, "rescale_acts_by_decoder_norm", default=False),
    )


@contextmanager
def open_tensors(found: Located) -> Iterator[Reader]:
    """A function that reads one tensor by name."""
    scale = _scale(found, _normalisation(read_json(found, "cfg.json")))
    factor = {"W_enc": scale, "W_dec": 1 / scale, "b_dec": 1 / scale}
    with open_safetensors(found, _WEIGHTS) as file:

        def read(name: str) -> Tensor:
            tensor = read_tensor(file, name)
            return tensor if scale == 1 or name not in factor else tensor.float() * factor[name]

        yield read


def _architecture(found: Located, config: dict[str, Any]) -> str:
    architecture = config.get("architecture", "standard")
    if architecture == "standard" and _activation(found, config) == "topk":
        architecture = "topk"  # before SAELens 6
    if architecture not in _ARCHITECTURES:
        raise SAEError(
            f"SAE {found.source} has architecture {architecture!r}; choose one of "
            f"{', '.join(_ARCHITECTURES)} (SAELens saves a trained batchtopk as jumprelu)."
        )
    return architecture


def _activation(found: Located, config: dict[str, Any]) -> str | None:
    return text(found, config, "activation_fn") or text(found, config, "activation_fn_str")


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
    name = "hook_layer" if "hook_layer" in config else "hook_point_layer"
    return integer(found, config, name), RESID_POST


def _normalisation(config: dict[str, Any]) -> Any:
    """`normalize_activations` by its name of today, or whatever else stands there."""
    normalize = config.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):  # a bool before SAELens 4
        return _SCALED if normalize else "none"
    return normalize


def _input_norm(found: Located, config: dict[str, Any]) -> str | None:
    """The normalisation that belongs to encoding; None where the tensors need none."""
    normalize = _normalisation(config)
    if normalize == _WHITENED:
        raise SAEError(
            f"SAE {found.source} has normalize_activations={normalize!r}, which is not in its "
            f"weights yet; fold it in with SAELens' fold_activation_whitening and save it again."
        )
    if normalize in _BY_ROW:
        return normalize
    if normalize != _SCALED:
        refuse_settings(found, {"normalize_activations": (normalize, "none")})
    _scale(found, normalize)
    return None


def _scale(found: Located, normalize: Any) -> float:
    """What the input is multiplied by, and the output divided by, besides the weights.

    SAELens' own load_from_disk leaves it out, and so computes something else than was trained.
    """
    if normalize != _SCALED:
        return 1.0
    # Not one of Format.optional: on the hub each SAE would be asked for what almost none has.
    path = found.paths["cfg.json"].with_name(_SCALER)
    if not path.is_file():
        raise SAEError(
            f"SAE {found.source} has normalize_activations={normalize!r} but its files lack the "
            f"scaling factor; fold it in with SAELens' fold_activation_norm_scaling_factor and "
            f"save it again, or give a local folder with its trainer's {_SCALER}."
        )
    beside = found._replace(paths={_SCALER: path})
    scale = number(beside, read_json(beside, _SCALER), "scaling_factor")
    if scale is None or not 1e-30 < scale < 1e30:
        raise SAEError(
            f"SAE {found.source} has scaling_factor={scale!r} in its {_SCALER}, which is no "
            f"positive number; fold the right one in with SAELens' "
            f"fold_activation_norm_scaling_factor and save it again."
        )
    return scale


def _refuse_rest(
    found: Located, config: dict[str, Any], architecture: str, hook_point: str
) -> None:
    """Refuse what changes the input or the output and is not in the tensors."""
    reshape = config.get("reshape_activations", "none")
    if hook_point.endswith(".hook_z") and reshape == "hook_z":
        reshape = "none"  # heads side by side, which is how rows of d_model come
    activation = _activation(found, config)
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
            known = headers["scaling_factor"].dtype in FLOATS
            if not known or not bool((read_tensor(file, "scaling_factor") == 1).all()):
                raise SAEError(
                    f"SAE {found.source} has a finetuned scaling_factor; fold it into W_dec and "
                    f"save it again."
                )
            del headers["scaling_factor"]
    return headers
