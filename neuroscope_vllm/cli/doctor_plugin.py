"""`neuroscope doctor`: does vLLM find our plugin, and is it alone?

vLLM takes seconds to import, so a child does, which starts first and is read last.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import msgspec

from neuroscope_vllm.cli.doctor_check import Check, Section
from neuroscope_vllm.cli.doctor_versions import OURS, vllm_package
from neuroscope_vllm.cli.supervise import console

GROUP = "vllm.general_plugins"
NAME = "neuroscope"
TIMEOUT_S = 300.0


class Probe:
    """A child that imports vLLM; none where there is no vLLM, or it is not asked for."""

    def __init__(self, backend: str) -> None:
        self._child: subprocess.Popen[str] | None = None
        if backend == "vllm" and vllm_package() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "neuroscope_vllm.engine.vllm.probe"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def report(self, section: Section) -> None:
        if self._child is None:
            section.skip("vllm_import", "vLLM is not installed")
            section.skip("architectures", "vLLM is not installed")
            return
        try:
            with console.status("importing vLLM"):
                out, err = self._child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            out, err = "", f"it took more than {TIMEOUT_S:.0f} s"
        if self._child.returncode != 0:
            said = (err.strip().splitlines() or [f"exit code {self._child.returncode}"])[-1]
            section.fail(
                "vllm_import",
                f"vLLM can not be imported: {said}",
                "Mend what it says, or install vLLM again in a fresh environment"
                " (examples/setup.sh); python -c 'import vllm' shows the whole error.",
            )
            section.skip("architectures", "vLLM can not be imported")
            return
        _report_probed(section, out.strip().splitlines()[-1])


def _report_probed(section: Section, line: str) -> None:
    from neuroscope_vllm.engine.vllm.probe import Probed

    found = msgspec.json.decode(line, type=Probed)
    if found.platform:
        device = f"{found.platform}, {found.device}" if found.device else found.platform
        section.ok("vllm_import", f"vLLM {found.version} on {device}")
    else:
        section.fail(
            "vllm_import",
            f"vLLM {found.version} finds no device that it was built for, so it can not start.",
            "Mend the GPU's driver (nvidia-smi must list it; a container wants --gpus all), or"
            " install vLLM's CPU build with examples/setup.sh.",
        )
    for name, architectures in found.replaced.items():
        section.fail(
            "architectures",
            f"the plugin {name} registers {', '.join(architectures)} too, so vLLM may build its"
            " model and not the observed one.",
            f"Uninstall {name}, or leave it out with VLLM_PLUGINS={NAME}.",
            name,
        )
    for name, error in found.broken.items():
        section.warn(
            "architectures",
            f"the plugin {name} fails: {error}",
            f"Uninstall or mend {name}, or leave it out with VLLM_PLUGINS={NAME}.",
            name,
        )
    if not found.replaced and not found.broken:
        section.ok("architectures", "no other plugin registers a model that is observed")


def plugin_checks(backend: str, probe: Probe) -> list[Check]:
    section = Section("plugin", "entry_point", "allowed", "vllm_import", "architectures")
    if backend != "vllm":
        return section.done("with --backend transformers no vLLM runs")
    _entry_point(section)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        section.ok("allowed", "VLLM_PLUGINS is not set, so vLLM runs all plugins")
    elif NAME in allowed.split(","):
        section.ok("allowed", f"VLLM_PLUGINS is {allowed}")
    else:
        section.fail(
            "allowed",
            f"VLLM_PLUGINS is {allowed!r}, which leaves {NAME} out.",
            f"Unset VLLM_PLUGINS, or add {NAME} to it.",
        )
    probe.report(section)
    return section.done()


def _entry_point(section: Section) -> None:
    found = [point for point in metadata.entry_points(group=GROUP) if point.name == NAME]
    if len(found) != 1:
        where = ", ".join(_home(point) for point in found) or "nowhere"
        section.fail(
            "entry_point",
            f"{len(found)} entry points {NAME} of {GROUP}, {where}; vLLM wants one.",
            f"Run pip uninstall {OURS} until it is gone, then install it once with vLLM's Python.",
        )
        return
    (point,) = found
    try:
        point.load()
    except Exception as error:  # what a broken installation raises is not ours to list
        section.fail(
            "entry_point",
            f"{point.value} can not be imported ({type(error).__name__}: {error}).",
            f"Install {OURS} again: pip install --force-reinstall --no-deps {OURS}.",
        )
        return
    section.ok("entry_point", f"{point.value} of {_home(point)}")


def _home(point: metadata.EntryPoint) -> str:
    if point.dist is None:
        return "unknown"
    return f"{point.dist.name} {point.dist.version} in {point.dist.locate_file('')}"
