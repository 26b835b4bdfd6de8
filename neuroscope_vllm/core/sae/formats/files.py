"""Reading the files that several formats are made of: JSON and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae.formats.base import Header, Located
from neuroscope_vllm.core.sae.info import RESID_POST

_RESID_POST = re.compile(r"blocks\.(\d+)\.hook_resid_post|(?:model\.)?layers\.(\d+)(?:\.output)?")
_RESID_PRE = re.compile(r"blocks\.([1-9]\d*)\.hook_resid_pre")
_LAYER = re.compile(r"(?:blocks|layers)\.(\d+)(?:\.|$)")


def read_json(found: Located, name: str) -> dict[str, Any]:
    """A configuration file. Raises SAEError if it is not a JSON object."""
    try:
        config = json.loads(found.paths[name].read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise SAEError(
            f"SAE {found.source} has a {name} that is not JSON ({error}); export it again."
        ) from error
    if not isinstance(config, dict):
        raise SAEError(
            f"SAE {found.source} has a {name} that is not a JSON object; export it again."
        )
    return config


def text(found: Located, config: dict[str, Any], name: str) -> str | None:
    """A setting that is text where it is there. Raises SAEError if it is something else."""
    return _typed(found, config, name, str, "text")


def section(found: Located, config: dict[str, Any], name: str) -> dict[str, Any]:
    """A setting that is an object, empty where it is missing. Raises SAEError as `text`."""
    return _typed(found, config, name, dict, "an object") or {}


def integer(found: Located, config: dict[str, Any], name: str) -> int | None:
    """A setting that is a whole number where it is there. Raises SAEError as `text`."""
    return _typed(found, config, name, int, "a whole number")


def number(found: Located, config: dict[str, Any], name: str) -> float | None:
    """A setting that is a number where it is there. Raises SAEError as `text`."""
    return _typed(found, config, name, (int, float), "a number")


def flag(found: Located, config: dict[str, Any], name: str, *, default: bool) -> bool:
    """A setting that is true or false, `default` where it is missing. Raises SAEError as `text`."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise _mistyped(found, name, value, "true or false")
    return value


def check_sizes(found: Located, config: dict[str, Any], sizes: dict[str, int]) -> None:
    """Check that a configuration agrees with the tensors.

    Args:
        sizes: `{setting: the tensors' size}`; a setting that is missing says nothing.

    Raises:
        SAEError: A setting is another number, or none.
    """
    for name, size in sizes.items():
        if integer(found, config, name) not in (None, size):
            raise SAEError(
                f"SAE {found.source} has {name}={config[name]!r} in its configuration but tensors "
                f"of {size}; give files that belong together."
            )


def _typed(
    found: Located, config: dict[str, Any], name: str, kind: type | tuple[type, ...], says: str
) -> Any:
    value = config.get(name)
    # A bool is an int to Python, and to no configuration.
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise _mistyped(found, name, value, says)
    return value


def _mistyped(found: Located, name: str, value: Any, says: str) -> SAEError:
    return SAEError(
        f"SAE {found.source} has {name}={value!r} in its configuration, which must be {says}; "
        f"export it again."
    )


def place_of(hook: str) -> tuple[int | None, str]:
    """(layer, hook point) of a hook's name in TransformerLens or in transformers."""
    if match := _RESID_POST.fullmatch(hook):
        return int(match[1] or match[2]), RESID_POST
    if match := _RESID_PRE.fullmatch(hook):
        # The stream before layer L is the stream after L - 1.
        return int(match[1]) - 1, RESID_POST
    match = _LAYER.search(hook)
    return (int(match[1]) if match else None), hook


@contextmanager
def open_safetensors(found: Located, name: str) -> Iterator[Any]:
    """The file, with what safetensors raises on damaged ones as SAEError."""
    try:
        with safe_open(str(found.paths[name]), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SAEError(
            f"SAE {found.source} has truncated or corrupt weights ({error}); download it again."
        ) from error


def read_tensor(file: Any, name: str) -> Tensor:
    """A copy: a tensor over the file's own pages would die with a file that is replaced."""
    return file.get_tensor(name).clone()


def safetensors_headers(file: Any) -> dict[str, Header]:
    """Headers of all tensors, by the file's own names."""
    headers = {}
    for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
        part = file.get_slice(name)
        headers[name] = Header(tuple(part.get_shape()), str(part.get_dtype()))
    return headers


def transposed(header: Header) -> Header:
    return header._replace(shape=header.shape[::-1])


def refuse_settings(found: Located, asked: dict[str, tuple[Any, Any]]) -> None:
    """Raise SAEError for the first of `{setting: (value, the value that is served)}` to differ."""
    for name, (value, served) in asked.items():
        # 0 == False to Python, but not to a publisher's loader that asks for its type.
        if value is not None and (type(value) is not type(served) or value != served):
            raise SAEError(
                f"SAE {found.source} has {name}={value!r}, which is not served; choose one with "
                f"{served!r}."
            )
