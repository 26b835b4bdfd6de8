"""Gemma Scope (google/gemma-scope-*, of Gemma 2): `params.npz`.

Parameters take their input raw, and b_dec is folded into the encoder already (arXiv 2408.05147, 3.1
and appendix A). The layer, and what else is known, is in the path. What each suite reads, named as
SAELens does:

    res          resid_post                   the residual stream after the layer
    mlp          blocks.L.hook_mlp_out        the MLP's output, after its post-norm
    att          blocks.L.attn.hook_z         all heads' outputs side by side, before o_proj
    transcoders  blocks.L.ln2.hook_normalized the MLP's input over its RMS, before the norm's gain;
                                              they predict blocks.L.hook_mlp_out
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.canonical import FOLDER, REPOSITORY, neuronpedia_id
from neuroscope_vllm.core.sae.formats.base import (
    Description,
    Header,
    Located,
    Reader,
    check_headers,
)
from neuroscope_vllm.core.sae.info import RESID_POST, SAEInfo

_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error),  # the archive
    NotImplementedError,  # zipfile's, of a compression it does not know
    *(ValueError, SyntaxError, tokenize.TokenError, RecursionError),  # a header is parsed as Python
    *(EOFError, OSError, KeyError),
)
_DEFLATE_RATIO = 1032  # the most that a byte can expand to
_READS = {
    "res": RESID_POST,
    "mlp": "blocks.{}.hook_mlp_out",
    "att": "blocks.{}.attn.hook_z",
    "transcoders": "blocks.{}.ln2.hook_normalized",
}


def read_info(found: Located) -> Description:
    """Check the headers of the npz file.

    Raises:
        SAEError: Truncated, pickled, malformed, or of a suite that is not known.
    """
    where = PurePath(found.source).as_posix()
    repo, path = REPOSITORY.search(where), FOLDER.search(where)
    suite = repo[3] if repo else "res"
    if suite not in _READS:
        raise SAEError(
            f"SAE {found.source} is of the suite {suite!r}, which is not known; choose one of "
            f"{', '.join(_READS)}."
        )
    if "/embedding/" in where:
        raise SAEError(
            f"SAE {found.source} reads embeddings, not the residual stream after a layer; choose "
            f"one of its repository's layer_* folders."
        )
    d_model, width = check_headers(found, _headers(found), "jumprelu")
    layer = path[1] if path else "L"
    info = SAEInfo(
        source=found.source,
        revision=found.revision,
        format="gemma-scope",
        architecture="jumprelu",
        d_model=d_model,
        width=width,
        layer=int(path[1]) if path else None,
        hook_point=_READS[suite].format(layer),
        model_name=f"gemma-2-{repo[1]}{'-it' if repo[2] == 'it' else ''}" if repo else None,
        neuronpedia_id=neuronpedia_id(where),
        output_point=_READS["mlp"].format(layer) if suite == "transcoders" else None,
    )
    return Description(info)


@contextmanager
def open_tensors(found: Located) -> Iterator[Reader]:
    """A function that reads one tensor by name."""
    with _errors(found), np.load(found.paths["params.npz"], allow_pickle=False) as archive:
        members = {_tensor_name(name): name for name in archive.files}

        def read(name: str) -> Tensor:
            array = archive[members[name]]
            return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))

        yield read


def _tensor_name(member: str) -> str:
    """Name of the tensor in an npz member; some exports write w_enc for W_enc."""
    name = member.removesuffix(".npy")
    return {"w_enc": "W_enc", "w_dec": "W_dec"}.get(name, name)


def _headers(found: Located) -> dict[str, Header]:
    headers = {}
    with _errors(found), zipfile.ZipFile(found.paths["params.npz"]) as archive:
        for member in archive.infolist():
            name = _tensor_name(member.filename)
            if name in headers:
                raise SAEError(f"SAE {found.source} holds {name} twice; export it again.")
            _check_member(found, member)
            with archive.open(member) as file:
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[np.lib.format.read_magic(file)]
                shape, _, dtype = read(file)
                stored = member.file_size - file.tell()
            if dtype.hasobject:
                raise SAEError(
                    f"SAE {found.source} stores {name} as Python objects, which is a pickle, and "
                    f"pickles can run code when opened; export it as plain float arrays."
                )
            if math.prod(shape) * dtype.itemsize != stored:
                raise SAEError(
                    f"SAE {found.source} has {name} of shape {list(shape)} as {dtype}, but stores "
                    f"{stored} bytes of it; download or export it again."
                )
            headers[name] = Header(shape, dtype.name)
    return headers


def _check_member(found: Located, member: zipfile.ZipInfo) -> None:
    """Raise SAEError for a member that numpy did not write, or that claims more than it can hold.

    Its size is what numpy would allocate, before it reads a byte.
    """
    plain = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    encrypted = bool(member.flag_bits & 1)
    held = found.paths["params.npz"].stat().st_size
    if encrypted or not plain or member.file_size > held * _DEFLATE_RATIO:
        raise SAEError(
            f"SAE {found.source} holds {member.filename} encrypted, damaged or compressed in a way "
            f"that numpy does not; export it with numpy's savez."
        )


@contextmanager
def _errors(found: Located) -> Iterator[None]:
    """What numpy and zipfile raise on damaged files, as a sentence."""
    try:
        yield
    except SAEError:
        raise
    except _DAMAGE as error:
        raise SAEError(
            f"SAE {found.source} is truncated or not an npz file ({error}); download it again."
        ) from error
