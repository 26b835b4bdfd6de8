"""What only a process that imports vLLM can tell. `neuroscope doctor` runs it as a child.

    python -m neuroscope_vllm.engine.vllm.probe

The last line of stdout is a `Probed` as JSON; vLLM logs before it.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Any

import msgspec

from neuroscope_vllm.engine.vllm.models import SERVED

GROUP = "vllm.general_plugins"
OURS = "neuroscope"


class Probed(msgspec.Struct):
    """
    Attributes:
        platform: vLLM's name of it, e.g. "cuda" or "cpu"; empty: none that it was built
            for is there.
        device: Name of the GPU; None: there is none.
        broken: Other plugins that fail, and how.
        replaced: Architectures of ours that another plugin registers too, by plugin.
    """

    version: str
    platform: str
    device: str | None = None
    broken: dict[str, str] = {}
    replaced: dict[str, list[str]] = {}


def probe() -> Probed:
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    # The process's own device alone is asked: a GPU's name takes no context.
    device = current_platform.get_device_name() if current_platform.is_cuda_alike() else None
    found = Probed(vllm.__version__, current_platform.device_type, device)
    for plugin in _others():
        before = {name: ModelRegistry.models.get(name) for name in SERVED}
        try:
            plugin.load()()
        except Exception as error:  # other people's code
            found.broken[plugin.name] = f"{type(error).__name__}: {error}"
        taken = [name for name in SERVED if ModelRegistry.models.get(name) is not before[name]]
        if taken:
            found.replaced[plugin.name] = taken
    return found


def _others() -> list[Any]:
    """Entry points that vLLM would run beside ours."""
    allowed = os.environ.get("VLLM_PLUGINS")
    names = None if allowed is None else allowed.split(",")
    return [
        plugin
        for plugin in metadata.entry_points(group=GROUP)
        if plugin.name != OURS and (names is None or plugin.name in names)
    ]


if __name__ == "__main__":
    sys.stdout.write("\n" + msgspec.json.encode(probe()).decode() + "\n")
