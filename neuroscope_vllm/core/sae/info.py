"""What an SAE says about itself. Torch-free: the server and the CLI read it too."""

from __future__ import annotations

import msgspec

from neuroscope_vllm.core.errors import SAEError


class SAEInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and shape of one SAE.

    Attributes:
        source: The path or URI exactly as the user gave it.
        revision: Commit sha on the hub; None for a local file.
        format: Row of `formats.FORMATS` that reads it: "gemma-scope" or "saelens".
        architecture: "jumprelu", or "standard" (ReLU: all thresholds are zero).
        d_model: Size of the residual stream.
        width: Number of features.
        layer: Zero-indexed decoder layer, when the files or their path record one.
        hook_point: Always "resid_post": the residual stream after `layer`.
        model_name: Model the SAE was trained on, as the publisher writes it.
        neuronpedia_id: "model/source" on Neuronpedia, when recorded.
    """

    source: str
    format: str
    architecture: str
    d_model: int
    width: int
    revision: str | None = None
    layer: int | None = None
    hook_point: str = "resid_post"
    model_name: str | None = None
    neuronpedia_id: str | None = None


def check_fits(info: SAEInfo, *, d_model: int, num_layers: int, layer: int) -> None:
    """Check that an SAE can read `layer` of a model.

    Args:
        info: The SAE.
        d_model: Residual size of the model.
        num_layers: Number of decoder layers of the model.
        layer: Zero-indexed layer that the user asked to observe.

    Raises:
        SAEError: The sizes differ, the model has no such layer, or the SAE is of another layer.
    """
    if info.d_model != d_model:
        raise SAEError(
            f"SAE {info.source} reads residuals of size {info.d_model} but this model's have size "
            f"{d_model}; choose an SAE trained on this model."
        )
    if not 0 <= layer < num_layers:
        raise SAEError(
            f"layer {layer} does not exist; this model has {num_layers} layers, numbered 0 to "
            f"{num_layers - 1}."
        )
    if info.layer is not None and info.layer != layer:
        raise SAEError(
            f"SAE {info.source} was trained on layer {info.layer} and cannot read layer {layer}; "
            f"ask for layer {info.layer}, or choose an SAE of layer {layer}."
        )
