"""vLLM as an `Engine`: corpus passes through `vllm.LLM`, on the model class that serves too.

The layers above the last observed one are not built: nothing of them reaches the rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

# Before vLLM is imported. With the engine core in this process all sequences of a run are there
# before its first step, so batches, and with them roundings, are the same each time.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from neuroscope_vllm.core.artefacts import model_files
from neuroscope_vllm.core.config import Settings, settings_dict
from neuroscope_vllm.core.errors import ConfigError, EngineError, NeuroscopeError
from neuroscope_vllm.core.passes import Pass
from neuroscope_vllm.core.sae.observed import named, observed
from neuroscope_vllm.engine.protocol import Chunk
from neuroscope_vllm.engine.serving.sites import check_sites
from neuroscope_vllm.engine.vllm import front
from neuroscope_vllm.engine.vllm.passes import BEGIN_RPC, END_RPC
from neuroscope_vllm.engine.vllm.self_test import SelfTestFailed
from neuroscope_vllm.engine.vllm.settings import KEY


class VLLMEngine:
    """See `engine.protocol.Engine`."""

    def __init__(
        self,
        model: str,
        settings: Settings,
        max_tokens: int | None = None,
        vllm_flags: Sequence[str] = (),
    ) -> None:
        """
        Args:
            model: Folder or hub id.
            settings: SAEs, layers and `sae_input`; all else is for servers.
            max_tokens: Longest sequence to be run; None: what the model and the memory allow.
            vllm_flags: As for `vllm serve`.

        Raises:
            ConfigError, SAEError, DownloadError: Something does not fit; one sentence says what.
            EngineError: vLLM did not start.
        """
        arguments = parse_flags(model, vllm_flags)
        if arguments.data_parallel_size > 1:
            raise ConfigError("a corpus pass runs on one engine; leave --data-parallel-size out.")
        arguments.enable_prefix_caching = False  # a cached row would not run
        wanted_len = -1 if max_tokens is None else max_tokens + 1  # -1: as long as fits
        arguments.max_model_len = arguments.max_model_len or wanted_len
        with loading(model):
            config = arguments.create_model_config()
            settings = named(settings, config.model)
            self.sites = observed(settings)
            check_sites(
                self.sites,
                d_model=config.get_hidden_size(),
                num_layers=config.get_total_num_hidden_layers(),
            )
            _cut_off(arguments, config, max(self.sites) + 1)
            wanted = Settings(sae=settings.sae, layer=settings.layer, sae_input=settings.sae_input)
            given = settings_dict(wanted)
            arguments.additional_config = {**(arguments.additional_config or {}), KEY: given}
            with front.passes_only():
                self._llm = LLM.from_engine_args(arguments)
        self.model = model
        self.identity = identity(model, config, vllm_flags)
        self.sae_input = settings.sae_input
        self.max_tokens: int = self._llm.model_config.max_model_len - 1  # one is generated
        self.tokenizer: Any = self._llm.get_tokenizer()

    def run(self, what: Pass, sequences: Chunk) -> dict[int, bytes]:
        prompts = [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in sequences]
        once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        try:
            self._llm.collective_rpc(BEGIN_RPC, args=(msgspec.msgpack.encode(what),))
            # All wait before the first runs: else batches, and with them roundings, depended on how
            # fast they come.
            self._llm.sleep(level=0)
            self._llm.enqueue(prompts, once, use_tqdm=False)
            self._llm.wake_up(tags=["scheduling"])
            self._llm.wait_for_completion(use_tqdm=False)
            results = self._llm.collective_rpc(END_RPC)
        except NeuroscopeError:
            raise
        except Exception as error:
            raise EngineError(
                f"vLLM failed on {len(sequences)} sequences ({reason(error)}); what was done"
                " before stands, so the same command goes on from there."
            ) from error
        total = sum(map(len, sequences))
        for seen, found in results:
            if found and seen != total:
                raise EngineError(
                    f"vLLM ran {seen} of {total} tokens, so the pass would be false; leave out vLLM"
                    " flags that make it skip or repeat some."
                )
        return {layer: result for _, found in results for layer, result in found.items()}

    def run_each(
        self, what: Callable[[], Pass], chunks: Iterable[Chunk]
    ) -> Iterator[dict[int, bytes]]:
        return (self.run(what(), chunk) for chunk in chunks)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def loading(model: str) -> Iterator[None]:
    """Whatever keeps vLLM from starting is a NeuroscopeError."""
    try:
        yield
    except NeuroscopeError:
        raise
    except SelfTestFailed as error:
        raise EngineError(str(error)) from None
    # vLLM's own checks raise ValueError, its workers anything.
    except Exception as error:
        raise EngineError(
            f"vLLM could not load {model} ({reason(error)}); see whether `vllm serve {model}`"
            " starts with the same flags."
        ) from error


def identity(model: str, config: ModelConfig, vllm_flags: Sequence[str]) -> str:
    """See `engine.protocol.Engine`."""
    commit = getattr(config.hf_config, "_commit_hash", None)
    return (
        f"vllm {vllm.__version__}, {config.dtype}, {' '.join(vllm_flags)}, {commit or ''}"
        f"{model_files(model)}"
    )


def parse_flags(model: str, vllm_flags: Sequence[str]) -> EngineArgs:
    """What `vllm serve` makes of its flags."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    given: Any = parser.parse_args(["--model", model, *vllm_flags])
    return EngineArgs.from_cli_args(given)


def _cut_off(arguments: EngineArgs, config: Any, num_layers: int) -> None:
    """Have only the first layers built."""
    text = config.hf_text_config
    cut: dict[str, Any] = {"num_hidden_layers": num_layers}
    if types := getattr(text, "layer_types", None):
        cut["layer_types"] = types[:num_layers]
    given = arguments.hf_overrides if isinstance(arguments.hf_overrides, dict) else {}
    if text is not config.hf_config:  # a text model inside another
        cut = {"text_config": {**given.get("text_config", {}), **cut}}
    arguments.hf_overrides = {**given, **cut}


def reason(error: BaseException) -> str:
    """The first line that says why, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("1 validation error") and len(lines) > 1:  # pydantic's, then why
        lines = lines[1:]
    return lines[0].strip().rstrip(".")
