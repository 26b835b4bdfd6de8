"""All features of given sequences, from vLLM, in a process of its own.

`python -m tests.support.feature_pass JOBS.json` writes the fields of a TokenFeatures to
OUT/LAYER.safetensors for each `Job`. Importing vLLM takes longer than a pass, so jobs share a
process.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from neuroscope_vllm.core.passes import FeaturePass, TokenFeatures
from tests.support.served import environment

TORCHVISION_CPU = Path(__file__).parent / "torchvision_cpu"
"""For PYTHONPATH, where there is no torchvision: the names that vLLM's multimodal models import."""


@dataclass(frozen=True)
class Job:
    """Folders and flags of one engine, and the token ids of what it runs."""

    out: Path
    model: Path
    saes: list[Path]
    sequences: list[list[int]]
    flags: list[str]

    def results(self) -> dict[int, TokenFeatures]:
        """By layer."""
        files = self.out.glob("*.safetensors")
        return {int(path.stem): TokenFeatures(**load_file(path)) for path in files}


def run_jobs(jobs: list[Job], folder: Path) -> None:
    file = folder / "jobs.json"
    file.write_text(json.dumps([asdict(job) for job in jobs], default=str))
    words = [sys.executable, "-m", "tests.support.feature_pass", str(file)]
    lacking = importlib.util.find_spec("torchvision") is None
    env = environment({"PYTHONPATH": str(TORCHVISION_CPU)} if lacking else None)
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        _run(job)


def _run(job: dict[str, Any]) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    from neuroscope_vllm.core.config import Settings
    from neuroscope_vllm.engine.vllm.engine import VLLMEngine

    engine = VLLMEngine(job["model"], Settings(sae=job["saes"]), vllm_flags=job["flags"])
    out = Path(job["out"])
    out.mkdir(parents=True)
    for layer, result in engine.run(FeaturePass(), job["sequences"]).items():
        (out / f"{layer}.safetensors").write_bytes(result)
    engine.close()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
