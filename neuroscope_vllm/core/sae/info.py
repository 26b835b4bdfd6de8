"""What an SAE says about itself. Torch-free: the server and the CLI read it too."""

from __future__ import annotations

import msgspec

from neuroscope_vllm.core.errors import SAEError

RESID_POST = "resid_post"
RMS, LAYER_NORM = "constant_norm_rescale", "layer_norm"
"""How rows are normalised one by one, by SAELens' names."""


class SAEInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and shape of one SAE.

    Attributes:
        source: The path or URI exactly as the user gave it.
        revision: Commit sha on the hub; None for a local file.
        format: Row of `formats.FORMATS` that reads it, for example "gemma-scope".
        architecture: "jumprelu"; "standard" (ReLU: all thresholds are zero); "gated" (held as a
            JumpReLU, which it equals); "topk" (ReLU, then the `k` largest of each row).
        d_model: Size of what it reads.
        width: Number of features.
        layer: Zero-indexed decoder layer, when the files or their path record one.
        hook_point: What it reads: "resid_post", the residual stream after `layer`, or any other
            place by the publisher's name for it, such as "blocks.20.hook_mlp_out".
        model_name: Model the SAE was trained on, as the publisher writes it.
        neuronpedia_id: "model/source" on Neuronpedia, when recorded.
        k: Features a row may have active ("topk" only).
        input_norm: How each row is normalised by itself before encoding, by SAELens' name:
            RMS (to norm sqrt(d_model)) or LAYER_NORM; None if it is not.
        output_point: What a transcoder predicts; None for an autoencoder.
    """

    source: str
    format: str
    architecture: str
    d_model: int
    width: int
    revision: str | None = None
    layer: int | None = None
    hook_point: str = RESID_POST
    model_name: str | None = None
    neuronpedia_id: str | None = None
    k: int | None = None
    input_norm: str | None = None
    output_point: str | None = None


def check_fits(info: SAEInfo, *, d_model: int, num_layers: int, layer: int) -> None:
    """Check that an SAE can read `layer` of a model that is served.

    Args:
        info: The SAE.
        d_model: Residual size of the model.
        num_layers: Number of decoder layers of the model.
        layer: Zero-indexed layer that the user asked to observe.

    Raises:
        SAEError: The server cannot run it, the sizes differ, the model has no such layer, or the
            SAE is of another layer.
    """
    check_served(info)
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


def check_served(info: SAEInfo) -> None:
    """Check that an SAE reads the residual stream and reconstructs it, which is what a server has.

    Raises:
        SAEError: It does not; `load_sae` and `SAE` still encode with it.
    """
    if info.hook_point != RESID_POST:
        raise SAEError(
            f"SAE {info.source} reads {info.hook_point}, but a server hooks only the residual "
            f"stream after a layer; choose one of {RESID_POST}."
        )
    if info.output_point is not None:
        raise SAEError(
            f"SAE {info.source} is a transcoder (it predicts {info.output_point}); choose an "
            f"autoencoder of {RESID_POST}."
        )
