"""Which features matter to a user: those that fired in recorded traffic. Torch-free."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from neuroscope_vllm.core.errors import ConfigError


class _Feature(msgspec.Struct):
    index: int


class _Event(msgspec.Struct):
    event: str | None = None
    layer: int | None = None
    top_features: list[_Feature] = []


def seen_in_traffic(path: Path, layer: int) -> list[int]:
    """Features of a layer by how many tokens show them, most first.

    Args:
        path: What `GET /v1/features/stream` writes as application/x-ndjson. Its last line may be
            cut off.

    Raises:
        ConfigError: It can not be read, a line (which is named) is no event, or none is of the
            layer.
    """
    decode = msgspec.json.Decoder(_Event).decode
    counts: Counter[int] = Counter()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):  # cut off, or its writer has not finished it
                    break
                if not line.strip():
                    continue
                try:
                    event = decode(line)
                except msgspec.DecodeError as error:
                    raise ConfigError(
                        f"line {number} of {path} is no event ({error}); record some with curl -N "
                        f"-H 'Accept: application/x-ndjson' http://127.0.0.1:8081/v1/features/stream"
                    ) from error
                if event.layer == layer:
                    counts.update({feature.index for feature in event.top_features})
    except OSError as error:
        raise ConfigError(
            f"traffic {path} can not be read ({error.strerror}); give a recorded stream."
        ) from error
    if not counts:
        raise ConfigError(f"traffic {path} shows no feature of layer {layer}; record that layer.")
    return [index for index, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
