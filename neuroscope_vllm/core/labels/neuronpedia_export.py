"""Fetch a source's explanations from Neuronpedia's public export, an S3 bucket. Torch-free.

https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/index.html?prefix=v1/ is where Neuronpedia
itself sends those who want many explanations.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import httpx
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from neuroscope_vllm.core.config import cache_dir, unwritable_cache
from neuroscope_vllm.core.errors import DownloadError
from neuroscope_vllm.core.labels.neuronpedia import by_number, check_identifier

BASE_VARIABLE = "NEURONPEDIA_EXPORTS"
"""Environment variable with the URL of a mirror."""
BASE = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
PARALLEL = 6
ATTEMPTS = 6
_FILE = re.compile(r"[\w.-]+\.jsonl(\.gz)?")


def fetch_explanations(
    identifier: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Path]:
    """The files of a source's explanations, in the cache; what is there already is not fetched.

    Args:
        identifier: "model/source", such as "gemma-2-2b/20-gemmascope-res-16k".
        progress: Is told how many files of how many are there.

    Raises:
        ConfigError: The identifier is none, or the cache can not be written.
        DownloadError: The export has no such source, or does not answer.
    """
    base = os.environ.get(BASE_VARIABLE, BASE).rstrip("/")
    prefix = f"v1/{check_identifier(identifier)}/explanations/"
    folder = cache_dir() / "neuronpedia" / identifier / "explanations"
    try:
        # Sizes are of files as they are stored, so nothing may compress them on the way.
        as_stored = {"Accept-Encoding": "identity"}
        with httpx.Client(timeout=30, follow_redirects=True, headers=as_stored) as client:
            sizes = _list(client, base, prefix)
            if not sizes:
                raise DownloadError(
                    f"{base} has no explanations of {identifier}; look the source up on "
                    f"neuronpedia.org, or give files with --from."
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _fetch_all(client, f"{base}/{prefix}", folder, sizes, progress)
            except OSError as error:
                raise unwritable_cache(error) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DownloadError(
            f"explanations of {identifier} could not be fetched from {base} ({_one_line(error)}); "
            f"try again, which goes on where this stopped, or give files with --from."
        ) from error
    return sorted((folder / name for name in sizes), key=by_number)


def _list(client: httpx.Client, base: str, prefix: str) -> dict[str, int]:
    """Size in bytes of each file right below a prefix."""
    sizes: dict[str, int] = {}
    query = {"list-type": "2", "prefix": prefix}
    while True:
        page = _parse(_get(client, base + "/", query))
        for entry in page.iterfind("{*}Contents"):
            key, size = entry.findtext("{*}Key") or "", entry.findtext("{*}Size") or ""
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and _FILE.fullmatch(name) and size.isdecimal():
                sizes[name] = int(size)
        following = page.findtext("{*}NextContinuationToken")
        if not following or following == query.get("continuation-token"):
            return sizes
        query["continuation-token"] = following


def _parse(body: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise httpx.DecodingError(f"the listing is not S3's: {error}") from error


def _fetch_all(
    client: httpx.Client,
    base: str,
    folder: Path,
    sizes: dict[str, int],
    progress: Callable[[int, int], None],
) -> None:
    wanted = [name for name, size in sizes.items() if not _has(folder / name, size)]
    done = len(sizes) - len(wanted)
    progress(done, len(sizes))
    with ThreadPoolExecutor(PARALLEL) as pool:
        futures = [
            pool.submit(_fetch, client, base + name, folder / name, sizes[name]) for name in wanted
        ]
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                progress(done, len(sizes))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _fetch(client: httpx.Client, url: str, path: Path, size: int) -> None:
    """Write one file, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(_get(client, url, size=size))
    partial.replace(path)


def _get(
    client: httpx.Client, url: str, query: dict[str, str] | None = None, size: int | None = None
) -> bytes:
    """The body as it is stored; asks again where that may help.

    Raises:
        httpx.HTTPError: It did not come, or has not `size` bytes.
    """
    for attempt in Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.25, max=8),
        reraise=True,
    ):
        with attempt, client.stream("GET", url, params=query) as response:
            response.raise_for_status()
            body = b"".join(response.iter_raw())
            if size is not None and len(body) != size:
                raise httpx.ReadError(f"{url} has {len(body)} bytes of {size}")
            return body
    raise AssertionError  # Retrying raises what the last attempt did


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (408, 429) or error.response.is_server_error
    return isinstance(error, httpx.TransportError) and not isinstance(
        error, httpx.UnsupportedProtocol
    )


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
