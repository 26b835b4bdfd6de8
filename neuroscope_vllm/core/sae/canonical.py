"""Which residual-stream SAE of Gemma Scope is meant by a model and a layer alone. Torch-free.

A layer has several releases of a width, with different mean L0. The canonical one is the one that
Neuronpedia shows: for Gemma 2 that whose mean L0 is closest to 100, for Gemma 3 that of medium L0
(SAELens' `pretrained_saes.yaml`).
"""

from __future__ import annotations

import math
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
REPOSITORY = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)")
FOLDER = re.compile(r"layer_(\d+)/width_(\w+)/average_l0_(\d+)")
"""In an address: the repository's name, and the folder of one SAE."""
# Gemma Scope 2 has each of its widths, with three L0s, on four layers of each model. Of medium L0
# (53 to 60) is the one that Neuronpedia shows.
LAYERS_2: dict[str, tuple[int, ...]] = {
    "270m": (5, 9, 12, 15),
    "1b": (7, 13, 17, 22),
    "4b": (9, 17, 22, 29),
    "12b": (12, 24, 31, 41),
    "27b": (16, 31, 40, 53),
}
WIDTHS_2 = ("16k", "65k", "262k", "1m")
_GEMMA_2 = re.compile(r"gemma-2-(2b|9b|27b)(-it)?")
_GEMMA_3 = re.compile(r"gemma-3-(270m|1b|4b|12b|27b)(?:-(pt|it))?")
_SECOND = re.compile(
    r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)/resid_post/layer_(\d+)_width_(\w+?)_l0_medium(?!\w)"
)
_SHOWN = re.compile(r"(gemma-[23]-\w+(?:-it)?)/(\d+)-gemmascope-(?:2-)?res-(\w+)")


def canonical_source(model: str, layer: int, width: str | None = None) -> str:
    """The hub address of Gemma Scope's canonical SAE of a Gemma 2 or Gemma 3 model's layer.

    An instruction-tuned Gemma 2 gets the SAE trained on it where there is one (9b, layers 9, 20 and
    31), and else its base model's, which transfers well (arXiv 2408.05147, 4.5). Every Gemma 3 has
    its own.

    Args:
        model: A name on the hub or a path that ends in one, such as `google/gemma-2-2b-it`.
        width: As the repository writes it, such as "65k"; the suite's narrowest by default.

    Raises:
        SAEError: Gemma Scope has no such SAE.
    """
    offered = _offered(model)
    wide = width or next(iter(offered))
    layers = offered.get(wide, {})
    if layer not in layers:
        raise SAEError(
            f"{SUITE} has no SAE of width {wide} on layer {layer} of {model}; its layers of that "
            f"width are {', '.join(map(str, layers)) or 'none'}, and its widths "
            f"{', '.join(offered)}."
        )
    return layers[layer]


def canonical_sources(model: str) -> dict[int, str]:
    """`canonical_source` of each layer that has one, at the suite's narrowest width.

    Raises:
        SAEError: Gemma Scope has no SAE of the model.
    """
    return next(iter(_offered(model).values()))


def _offered(model: str) -> dict[str, dict[int, str]]:
    """Addresses of a model's canonical SAEs: {width: {layer: address}}, the narrowest first."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    if match := _GEMMA_3.fullmatch(name):
        size, kind = match[1], match[2] or "pt"
        folder = f"hf://google/gemma-scope-2-{size}-{kind}/resid_post"
        return {
            width: {at: f"{folder}/layer_{at}_width_{width}_l0_medium" for at in LAYERS_2[size]}
            for width in WIDTHS_2
        }
    if match := _GEMMA_2.fullmatch(name):
        offered: dict[str, dict[int, str]] = {}
        for kind in ("pt", "it") if match[2] else ("pt",):
            repository = f"gemma-scope-{match[1]}-{kind}-res"
            for width, l0s in CANONICAL_L0.get(repository, {}).items():
                folder = f"hf://google/{repository}/layer_{{}}/width_{width}/average_l0_{{}}"
                offered.setdefault(width, {}).update(
                    {layer: folder.format(layer, l0) for layer, l0 in l0s.items()}
                )
        return offered
    raise SAEError(
        f"{SUITE} has no SAE of {model}; serve a Gemma 2 model (2b, 9b or 27b) or a Gemma 3 one "
        f"(270m, 1b, 4b, 12b or 27b), or give the address of an SAE trained on this one."
    )


def neuronpedia_id(address: str) -> str | None:
    """ "model/source" on Neuronpedia of a Gemma Scope SAE; None where the address does not tell.

    Neuronpedia shows one SAE of each layer and width: the canonical one of Gemma Scope, and the one
    of medium L0 of Gemma Scope 2 (SAELens' `pretrained_saes.yaml`).
    """
    if match := _SECOND.search(address):
        size, kind, layer, width = match.groups()
        return f"gemma-3-{size}{'-it' if kind == 'it' else ''}/{layer}-gemmascope-2-res-{width}"
    repository, folder = REPOSITORY.search(address), FOLDER.search(address)
    if repository is None or folder is None:
        return None
    layer, width, l0 = int(folder[1]), folder[2], int(folder[3])
    if CANONICAL_L0.get(repository[0], {}).get(width, {}).get(layer) != l0:
        return None
    instructed = "-it" if repository[2] == "it" else ""
    return f"gemma-2-{repository[1]}{instructed}/{layer}-gemmascope-{repository[3]}-{width}"


def shown_source(identifier: str) -> str | None:
    """The hub address of the Gemma Scope SAE that Neuronpedia shows as "model/source", if any."""
    if (match := _SHOWN.fullmatch(identifier)) is None:
        return None
    try:
        source = canonical_source(match[1], int(match[2]), match[3])
    except SAEError:
        return None
    return source if neuronpedia_id(source) == identifier else None


def features_of(width: str) -> int:
    """Number of features of a width as repositories write it: a power of two, such as "131k"."""
    thousands = int(width[:-1]) * {"k": 1, "m": 1000}[width[-1]]
    return 1 << round(math.log2(thousands * 1000))
