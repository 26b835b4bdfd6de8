"""vLLM as a `PatchEngine`: all runs of a sweep in its batches, with the prefix cache on.

What comes before a run's first replacement is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroscope_vllm.core.errors import ConfigError, EngineError
from neuroscope_vllm.core.patching.swap import Replacement
from neuroscope_vllm.engine.protocol import Chunk
from neuroscope_vllm.engine.vllm import front
from neuroscope_vllm.engine.vllm.engine import (
    LLM,
    EngineArgs,
    SamplingParams,
    TokensPrompt,
    identity,
    loading,
    parse_flags,
    reason,
)
from neuroscope_vllm.engine.vllm.ids import PATCHING
from neuroscope_vllm.engine.vllm.models import SERVED
from neuroscope_vllm.engine.vllm.patching import TAKE_RPC, PatchSpec, reading, replacing

STEP_TOKENS = 2048
"""Rows of a step, unless flags say otherwise: what is kept and replaced of each layer takes two
vectors a row."""
CPU_BLOCK = 32
"""Tokens of a prefix-cache block on a CPU, likewise: only whole blocks are shared, and vLLM's own
128 are more than most prompts have. Elsewhere it takes 16."""


class VLLMPatchEngine:
    """See `engine.protocol.PatchEngine`.

    Attributes:
        cached_tokens: Of all sequences that were run patched, those that the prefix cache had.
    """

    def __init__(
        self, model: str, max_tokens: int | None = None, vllm_flags: Sequence[str] = ()
    ) -> None:
        """
        Args:
            model: Folder or hub id.
            max_tokens: Longest sequence to be run; None: what the model and the memory allow.
            vllm_flags: As for `vllm serve`. Without --dtype the model runs in float32: a logit
                difference in bfloat16 is off by as much as a weak patch does. It is compiled only
                with --no-enforce-eager.

        Raises:
            ConfigError: The model can not be patched, or a flag does not fit.
            EngineError: vLLM did not start.
        """
        arguments = _fitting(parse_flags(model, vllm_flags), max_tokens)
        # A sweep is over before its graph would be compiled.
        arguments.enforce_eager = "--no-enforce-eager" not in vllm_flags
        with loading(model):
            config = arguments.create_model_config()
            if config.architecture not in SERVED:
                raise ConfigError(
                    f"{config.architecture} can not be patched on vLLM, only {', '.join(SERVED)};"
                    " use --backend transformers."
                )
            with front.patched():
                self._llm = LLM.from_engine_args(arguments)
        self.model = model
        self.identity = identity(model, config, vllm_flags)
        self.num_layers: int = config.get_total_num_hidden_layers()
        self.d_model: int = config.get_hidden_size()
        self.max_tokens: int = self._llm.model_config.max_model_len - 1  # one is generated
        self.tokenizer: Any = self._llm.get_tokenizer()
        self.cached_tokens = 0

    def residuals(self, sequences: Chunk, layers: Sequence[int]) -> list[dict[int, Tensor]]:
        self._run(sequences, [reading(number, layers) for number in range(len(sequences))])
        found = [
            {layer: torch.full((len(sequence), self.d_model), torch.nan) for layer in layers}
            for sequence in sequences
        ]
        for parts in self._llm.collective_rpc(TAKE_RPC):
            for part in parts:
                rows = np.frombuffer(bytearray(part["rows"]), np.float32).reshape(-1, self.d_model)
                into = found[part["number"]][part["layer"]][part["first"] :]
                into[: len(rows)] = torch.from_numpy(rows)[: len(into)]
        for layer in layers:
            if not all(own[layer].any() and own[layer].isfinite().all() for own in found):
                raise EngineError(
                    f"vLLM gave no residuals of layer {layer}, or ones that are not finite; look"
                    " for other plugins that replace the model, or use --backend transformers."
                )
        return found

    def patched(
        self, sequences: Chunk, edits: Sequence[Sequence[Replacement]], tokens: Sequence[int]
    ) -> Tensor:
        outputs = self._run(sequences, [replacing(own) for own in edits], tokens)
        self.cached_tokens += sum(output.num_cached_tokens or 0 for output in outputs)
        after = [output.outputs[0].logprobs[0] for output in outputs]
        return torch.tensor([[found[token].logprob for token in tokens] for found in after])

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _run(
        self, sequences: Chunk, wanted: Sequence[PatchSpec], tokens: Sequence[int] = ()
    ) -> list[Any]:
        prompts = [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in sequences]
        params = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                logprob_token_ids=list(tokens) or None,
                # A row that the cache has is not run, and can not be read.
                skip_reading_prefix_cache=bool(one["read"]),
                extra_args={PATCHING: one},
            )
            for one in wanted
        ]
        try:
            return self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            raise EngineError(
                f"vLLM failed on {len(sequences)} sequences ({reason(error)}); use shorter prompts,"
                " other vLLM flags, or --backend transformers."
            ) from error


def _fitting(arguments: EngineArgs, max_tokens: int | None) -> EngineArgs:
    """With what patching needs, where the user gave nothing else."""
    from vllm.platforms import current_platform  # once `engine` has set vLLM's environment

    if arguments.data_parallel_size > 1:
        raise ConfigError("patching runs on one engine; leave --data-parallel-size out.")
    if arguments.dtype == "auto":
        arguments.dtype = "float32"
    if arguments.enable_prefix_caching is None:
        arguments.enable_prefix_caching = True
    wanted_len = -1 if max_tokens is None else max_tokens + 1  # -1: as long as fits
    arguments.max_model_len = arguments.max_model_len or wanted_len
    arguments.max_num_batched_tokens = arguments.max_num_batched_tokens or STEP_TOKENS
    if current_platform.is_cpu():
        arguments.block_size = arguments.block_size or CPU_BLOCK
    arguments.logprobs_mode = "raw_logprobs"
    return arguments
