"""`neuroscope patch` as a user runs it, and what it should find, by plain transformers."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.patching.record import Patching
from neuroscope_vllm.core.patching.swap import Replacement
from tests.support.served import bin_path, environment


def patch(*words: str, **environ: str) -> tuple[int, str, str]:
    # The command sets these for its own process, which here is that of all tests.
    kept = {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_KVCACHE_SPACE": "1"}
    result = CliRunner().invoke(main, ["patch", *words], env={**kept, **environ})
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def record(*words: str) -> Patching:
    code, out, err = patch(*words, "--json")
    assert code == 0, err
    return msgspec.json.decode(out, type=Patching)


def record_on_vllm(*words: str) -> Patching:
    """In a process of its own, which vLLM binds to cores; words after `--` are its flags."""
    command = [bin_path("neuroscope"), "patch", "--json", "--backend", "vllm", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return msgspec.json.decode(done.stdout, type=Patching)


class Plain:
    """One sequence at a time, no cache, with the edits of one hook a layer."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.set_attn_implementation("eager")

    @torch.no_grad()
    def residuals(self, ids: Sequence[int]) -> list[Tensor]:
        kept: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda m, i, out: kept.append(out[0].clone()))
            for layer in self.model.model.layers
        ]
        self.model(torch.tensor([list(ids)]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return kept

    @torch.no_grad()
    def next(self, ids: Sequence[int], edits: Sequence[Replacement]) -> Tensor:
        """Log-probabilities [vocabulary]."""

        def edit(number: int) -> Any:
            def hook(module: Any, args: Any, out: Tensor) -> Tensor:
                for one in edits:
                    if one.layer == number:
                        out[0, one.position] = one.residual
                return out

            return hook

        layers = enumerate(self.model.model.layers)
        hooks = [layer.register_forward_hook(edit(number)) for number, layer in layers]
        logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(dim=0)
