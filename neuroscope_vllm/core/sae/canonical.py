"""Which residual-stream SAE of Gemma Scope is meant by a model and a layer alone. Torch-free.

A layer has several releases of a width, with different mean L0. The canonical one, which
Neuronpedia shows, is the one whose mean L0 is closest to 100 (SAELens' `pretrained_saes.yaml`).
"""

from __future__ import annotations

import re

from neuroscope_vllm.core.errors import SAEError

SUITE = "gemma-scope"


def _by_layer(l0s: str) -> dict[int, int]:
    return dict(enumerate(map(int, l0s.split())))


# Mean L0 of the canonical release: {repository: {width: {layer: L0}}}.
CANONICAL_L0: dict[str, dict[str, dict[int, int]]] = {
    "gemma-scope-2b-pt-res": {
        "16k": _by_layer(
            "105 102 141 59 124 68 70 69 71 73 77 80 82 84 84 78 78 77 74 73 71 70 72 75 73 116"
        ),
        "65k": _by_layer(
            "73 121 77 89 89 105 107 107 111 118 128 70 72 "
            "75 73 127 128 125 116 115 114 111 116 123 124 93"
        ),
        "32k": {12: 76},
        "262k": {12: 121},
        "524k": {12: 115},
        "1m": {5: 114, 12: 107, 19: 88},
    },
    "gemma-scope-9b-pt-res": {
        "16k": _by_layer(
            "129 69 67 90 91 77 93 92 99 100 113 118 130 132 "
            "67 131 75 73 71 132 68 129 123 120 114 114 116 118 "
            "119 119 120 114 111 114 114 120 120 124 128 131 125 113"
        ),
        "131k": _by_layer(
            "41 56 70 103 101 94 120 119 72 75 84 88 96 99 "
            "105 103 121 117 113 110 114 109 105 101 97 96 97 96 "
            "98 97 95 92 88 91 89 94 93 96 101 99 94 84"
        ),
        "32k": {20: 57},
        "65k": {20: 55},
        "524k": {20: 48},
        "1m": {9: 122, 20: 101, 31: 77},
    },
    "gemma-scope-9b-it-res": {
        "16k": {9: 88, 20: 91, 31: 76},
        "131k": {9: 121, 20: 81, 31: 109},
    },
    "gemma-scope-27b-pt-res": {"131k": {10: 106, 22: 82, 34: 72}},
}
_MODEL = re.compile(r"gemma-2-(2b|9b|27b)(-it)?", re.IGNORECASE)


def canonical_source(model: str, layer: int, width: str | None = None) -> str:
    """The hub address of Gemma Scope's canonical SAE of a Gemma 2 model's layer.

    An instruction-tuned model gets the SAE trained on it where there is one (9b, layers 9, 20 and
    31), and else its base model's, which transfers well (arXiv 2408.05147, 4.5).

    Args:
        model: A name on the hub or a path that ends in one, such as `google/gemma-2-2b-it`.
        width: As the repository writes it, such as "65k"; the suite's narrowest by default.

    Raises:
        SAEError: Gemma Scope has no such SAE.
    """
    match = _MODEL.fullmatch(model.rstrip("/").rsplit("/", 1)[-1])
    if match is None:
        raise SAEError(
            f"{SUITE} has no SAE of {model}; serve a Gemma 2 model (2b, 9b or 27b), or give the "
            f"address of an SAE trained on this one."
        )
    size = match[1].lower()
    repositories = [f"gemma-scope-{size}-pt-res"]
    if match[2]:
        repositories.insert(0, f"gemma-scope-{size}-it-res")
    for repository in repositories:
        suite = CANONICAL_L0.get(repository, {})
        chosen = width or next(iter(suite), "")
        if (l0 := suite.get(chosen, {}).get(layer)) is not None:
            return f"hf://google/{repository}/layer_{layer}/width_{chosen}/average_l0_{l0}"
    suite = CANONICAL_L0[repositories[-1]]
    wide = width or next(iter(suite))
    layers = ", ".join(map(str, suite.get(wide, {}))) or "none"
    raise SAEError(
        f"{SUITE} has no SAE of width {wide} on layer {layer} of {model}; its layers of that width "
        f"are {layers}, and its widths {', '.join(suite)}."
    )


def is_canonical(repository: str, layer: int, width: str, l0: int) -> bool:
    """Whether a release is the canonical one of its layer and width."""
    return CANONICAL_L0.get(repository, {}).get(width, {}).get(layer) == l0
