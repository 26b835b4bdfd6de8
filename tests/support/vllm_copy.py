"""A copy of the installed vLLM to change, which takes no room: its files are links."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

PATCHES = Path(__file__).parents[2] / "patches"


def copy_vllm(folder: Path) -> Path:
    """Make `folder`, for the front of PYTHONPATH, with vLLM in it; returns it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    # With its bytecode: it stays valid, as a hard link has the file's own time.
    shutil.copytree(Path(spec.origin).parent, folder / "vllm", copy_function=_link)
    return folder


def rewrite(path: Path, text: str) -> None:
    """Of a copy, without touching what is installed."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def patch_vllm(folder: Path, minor: str) -> None:
    """Apply `patches/vllm-<minor>.patch` to the copy in `folder`; fuzz is no fit."""
    patch = PATCHES / f"vllm-{minor}.patch"
    for name in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE):
        path = folder / name
        if path.exists():
            rewrite(path, path.read_text())
    words = ["patch", "--strip=1", "--fuzz=0", f"--directory={folder}", f"--input={patch}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
