"""Gemma Scope (google/gemma-scope-*-res): `params.npz`.

Parameters take raw residuals, and b_dec is folded into the encoder already (arXiv 2408.05147, 3.1
and appendix A). The layer, and what else is known, is in the path.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.formats.base import (
    JUMPRELU_TENSORS,
    Description,
    Header,
    Located,
    check_headers,
)
from neuroscope_vllm.core.sae.info import SAEInfo

_REPO = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)")
_PATH = re.compile(r"layer_(\d+)/width_(\w+)/average_l0_(\d+)")
# Neuronpedia shows one L0 a layer: the closest to 100. These are gemma-scope-2b-pt-res/width_16k.
_NEURONPEDIA_L0 = (
    *(105, 102, 141, 59, 124, 68, 70, 69, 71, 73, 77, 80, 82),
    *(84, 84, 78, 78, 77, 74, 73, 71, 70, 72, 75, 73, 116),
)


def read_info(found: Located) -> Description:
    """Check the headers of the npz file.

    Raises:
        SAEError: Truncated, pickled, malformed, or not a residual-stream SAE.
    """
    where = PurePath(found.source).as_posix()
    repo, path = _REPO.search(where), _PATH.search(where)
    if repo and repo[3] != "res":
        raise SAEError(
            f"SAE {found.source} reads {repo[3]} activations, not the residual stream; choose one "
            f"of gemma-scope-{repo[1]}-{repo[2]}-res."
        )
    if "/embedding/" in where:
        raise SAEError(
            f"SAE {found.source} reads embeddings, not the residual stream after a layer; choose "
            f"one of its repository's layer_* folders."
        )
    d_model, width = check_headers(found, _headers(found), JUMPRELU_TENSORS)
    info = SAEInfo(
        source=found.source,
        revision=found.revision,
        format="gemma-scope",
        architecture="jumprelu",
        d_model=d_model,
        width=width,
        layer=int(path[1]) if path else None,
        model_name=f"gemma-2-{repo[1]}{'-it' if repo[2] == 'it' else ''}" if repo else None,
        neuronpedia_id=_neuronpedia_id(repo, path),
    )
    return Description(info, subtract_b_dec=False)


@contextmanager
def open_tensors(found: Located) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one tensor by name."""
    with _errors(found), np.load(found.paths["params.npz"], allow_pickle=False) as archive:
        members = {_tensor_name(name): name for name in archive.files}

        def read(name: str) -> Tensor:
            array = archive[members[name]]
            return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))

        yield read


def _neuronpedia_id(repo: re.Match[str] | None, path: re.Match[str] | None) -> str | None:
    if repo is None or path is None or repo[0] != "gemma-scope-2b-pt-res" or path[2] != "16k":
        return None
    layer, l0 = int(path[1]), int(path[3])
    shown = layer < len(_NEURONPEDIA_L0) and l0 == _NEURONPEDIA_L0[layer]
    return f"gemma-2-2b/{layer}-gemmascope-res-16k" if shown else None


def _tensor_name(member: str) -> str:
    """Name of the tensor in an npz member; some exports write w_enc for W_enc."""
    name = member.removesuffix(".npy")
    return {"w_enc": "W_enc", "w_dec": "W_dec"}.get(name, name)


def _headers(found: Located) -> dict[str, Header]:
    headers = {}
    with _errors(found), zipfile.ZipFile(found.paths["params.npz"]) as archive:
        for member in archive.namelist():
            name = _tensor_name(member)
            with archive.open(member) as file:
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[np.lib.format.read_magic(file)]
                shape, _, dtype = read(file)
            if dtype.hasobject:
                raise SAEError(
                    f"SAE {found.source} stores {name} as Python objects, which is a pickle, and "
                    f"pickles can run code when opened; export it as plain float arrays."
                )
            headers[name] = Header(shape, str(dtype), dtype.kind == "f")
    return headers


@contextmanager
def _errors(found: Located) -> Iterator[None]:
    """What numpy and zipfile raise on damaged files, as a sentence."""
    try:
        yield
    except SAEError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError) as error:
        raise SAEError(
            f"SAE {found.source} is truncated or not an npz file ({error}); download it again."
        ) from error
