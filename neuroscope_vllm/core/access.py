"""Keys of the side process: where they come from, and what is left of them. Torch-free.

A front process reads them in clear and hands on SHA-256 digests alone. They never are settings,
which vLLM logs and hands to every worker: only the path of their file is one.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

import msgspec

from neuroscope_vllm.core.config import (
    ADMIN_KEYS_VARIABLE,
    KEYS_VARIABLES,
    METRICS_KEYS_VARIABLE,
    Settings,
)
from neuroscope_vllm.core.errors import ConfigError

VLLM_KEY_VARIABLE = "VLLM_API_KEY"
SECRET_VARIABLES = (*KEYS_VARIABLES, VLLM_KEY_VARIABLE)
"""What a side process has no need of: it knows digests."""
SECRET_HEADER = "X-Neuroscope-Stream-Secret"
SECRET_PATTERN = "^[!-~]{16,256}$"
"""Printable ASCII, so that it fits a header."""
SECRET_FORM = "has 16 to 256 printable ASCII characters, and no spaces"


class KeyDigests(msgspec.Struct, frozen=True):
    """Digests of the keys that read everything, of vLLM's own, which read what they name, and of
    those that read the metrics alone; without one of the first two nothing is guarded."""

    admin: list[bytes] = []
    user: list[bytes] = []
    metrics: list[bytes] = []

    def __bool__(self) -> bool:
        return bool(self.admin or self.user)


def digest(secret: str) -> bytes:
    """SHA-256, all that is kept of a key or secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def is_among(shown: bytes, digests: Iterable[bytes]) -> bool:
    """All are compared, each in constant time, so that time tells nothing of them."""
    found = [secrets.compare_digest(shown, one) for one in digests]
    return any(found)


def key_digests(settings: Settings, vllm_keys: Iterable[str]) -> KeyDigests:
    """Those of files and environment, and vLLM's. Raises ConfigError as `admin_keys`."""
    kinds = admin_keys(settings), vllm_keys, _metrics_keys(settings)
    return KeyDigests(*(list(map(digest, keys)) for keys in kinds))


def vllm_keys() -> list[str]:
    """vLLM's own key where none is on its command line."""
    key = os.environ.get(VLLM_KEY_VARIABLE)
    return [key] if key else []


def admin_keys(settings: Settings) -> list[str]:
    """In clear. Raises ConfigError on a file that is missing, readable by others, or without keys,
    and on a key that could be guessed."""
    return _keys(ADMIN_KEYS_VARIABLE, "admin_keys_file", settings.admin_keys_file)


def _metrics_keys(settings: Settings) -> list[str]:
    return _keys(METRICS_KEYS_VARIABLE, "metrics_keys_file", settings.metrics_keys_file)


def _keys(variable: str, setting: str, file: str | None) -> list[str]:
    """`setting`: the name of the one whose value is `file`."""
    given = os.environ.get(variable, "").split(",")
    keys = [key.strip() for key in given if key.strip()]
    where = variable
    if file is not None:
        where = f"{setting} {file}"
        lines = _read_secret(setting, Path(file).expanduser()).splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{where} holds no key; write one a line.")
        keys += found
    for key in keys:
        if not re.fullmatch(SECRET_PATTERN, key):
            raise ConfigError(
                f"a key of {where} is no good: one {SECRET_FORM}; make one with `openssl rand -hex"
                " 24`."
            )
    return keys


def _read_secret(setting: str, path: Path) -> str:
    try:
        with path.open() as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(1 << 16)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"{setting} {path} can not be read ({reason}).") from None
    if mode & 0o077:
        raise ConfigError(
            f"{setting} {path} can be read by other users (mode {mode & 0o777:o}) and is a"
            f" secret; run chmod 600 {path}."
        )
    return content
