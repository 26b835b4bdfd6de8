"""What a steered model generates, by code that nobody here wrote: transformers' forward hooks on
its own model, with SAELens' encoder and the decoder's rows; the whole text anew for every token."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import sae_lens
import torch
from transformers import AutoModelForCausalLM

from tests.support.served import Served


class Generated(NamedTuple):
    """Greedy tokens, and the log-probability of each."""

    ids: list[int]
    logprobs: list[float]


class SteeredReference:
    def __init__(
        self,
        folder: Path,
        saes: dict[int, Path],
        directions: dict[str, torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        sink_norms: dict[int, float] | None = None,
    ) -> None:
        """`sink_norms`: by layer, norms above which no feature is active."""
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.saes = {layer: sae_lens.SAE.load_from_disk(path) for layer, path in saes.items()}
        self.directions = directions or {}
        self.sink_norms = sink_norms or {}
        torch.set_num_threads(1)

    def encode(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        return self.saes[layer].encode(residual.float())

    @torch.no_grad()
    def run(
        self, ids: Sequence[int], edits: Sequence[dict[str, Any]], prompt: int
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """(log-probabilities [n, vocabulary], steered residuals [n, d_model] by layer)."""
        seen: dict[int, torch.Tensor] = {}
        handles = []
        for layer in self.saes:

            def hook(module: Any, args: Any, output: Any, layer: int = layer) -> Any:
                whole = isinstance(output, torch.Tensor)
                x = output if whole else output[0]
                y = x.clone()
                for edit in edits:
                    if edit["layer"] == layer:
                        y += self._change(x.float(), edit, prompt).to(x.dtype)
                seen[layer] = y[0].float()
                return y if whole else (y, *output[1:])

            handles.append(self.model.model.layers[layer].register_forward_hook(hook))
        try:
            logits = self.model(torch.tensor([list(ids)])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.float().log_softmax(-1), seen

    def _change(self, x: torch.Tensor, edit: dict[str, Any], prompt: int) -> torch.Tensor:
        value = edit.get("value")
        if edit["op"] == "direction":
            change = (value * self.directions[edit["direction"]]).expand_as(x).clone()
        else:
            sae = self.saes[edit["layer"]]
            f, d = sae.encode(x)[..., edit["feature"], None], sae.W_dec[edit["feature"]]
            f = f * (x.norm(dim=-1, keepdim=True) <= self.sink_norms.get(edit["layer"], math.inf))
            amount = {
                "add": lambda: torch.full_like(f, value),
                "clamp": lambda: value - f,
                "scale": lambda: (value - 1) * f,
                "ablate": lambda: -f / min(1.0, float(sae.W_enc[:, edit["feature"]] @ d)),
            }[edit["op"]]()
            change = amount * d
        where = edit.get("positions", "all")
        if where == "prompt":
            change[:, prompt:] = 0
        elif where == "generated":
            change[:, :prompt] = 0
        change[:, edit.get("until", change.shape[1]) :] = 0
        return change

    def generate(
        self, prompt_ids: Sequence[int], edits: Sequence[dict[str, Any]], count: int
    ) -> Generated:
        ids, logprobs = list(prompt_ids), []
        for _ in range(count):
            found, _ = self.run(ids, edits, len(prompt_ids))
            best = int(found[-1].argmax())
            ids.append(best)
            logprobs.append(float(found[-1, best]))
        return Generated(ids[len(prompt_ids) :], logprobs)


def ask(
    served: Served,
    prompt: str | list[int],
    options: dict[str, Any] | None = None,
    *,
    count: int = 12,
    request_id: str | None = None,
    **body: Any,
) -> httpx.Response:
    """POST /v1/completions, greedy, whatever the answer."""
    given = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
        **body,
    }
    if options is not None:
        given["vllm_xargs"] = {"neuroscope": json.dumps(options)}
    headers = {"X-Request-Id": request_id} if request_id else {}
    return httpx.post(f"{served.chat}/v1/completions", json=given, headers=headers, timeout=120)


def generated(answer: httpx.Response) -> tuple[list[int], Generated]:
    """(prompt ids, what was generated) of a 200."""
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    logprobs = choice["logprobs"]["token_logprobs"]
    return choice["prompt_token_ids"], Generated(choice["token_ids"], logprobs)


def assert_same(found: Generated, expected: Generated, tolerance: float = 1e-4) -> None:
    """Relative to the log-probabilities, which are of the order of 5."""
    assert found.ids == expected.ids
    assert found.logprobs == pytest.approx(expected.logprobs, rel=tolerance, abs=tolerance)
