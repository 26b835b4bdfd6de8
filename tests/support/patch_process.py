"""An engine in a process of its own, as vLLM binds the process it runs in to cores."""

from __future__ import annotations

import multiprocessing
import operator
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from torch import Tensor

from neuroscope_vllm.core.passes import Pass
from neuroscope_vllm.core.patching.swap import Replacement
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.engine.protocol import Chunk
from neuroscope_vllm.engine.spec import EngineSpec
from tests.support.served import START_TIMEOUT_S, environment

_opened: list[Any] = []  # in the process


class _Elsewhere:
    """Calls are answered by the engine there, one at a time. `how`: the method of `EngineSpec`."""

    def __init__(self, spec: EngineSpec, how: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn)
        try:
            self._do(_open, spec, how, environment())
        except BaseException:
            self._pool.shutdown()
            raise
        self.model: str = self.value("model")
        self.identity: str = self.value("identity")
        self.max_tokens: int = self.value("max_tokens")
        self.tokenizer: Any = _Tokenizer(self)

    def value(self, name: str) -> Any:
        return self._do(_value, name)

    def call(self, name: str, *given: Any) -> Any:
        # Pickled by value, where multiprocessing would share a tensor's memory.
        return pickle.loads(self._do(_call, name, pickle.dumps(given)))

    def close(self) -> None:
        self.call("close")
        self._pool.shutdown()

    def _do(self, what: Any, *given: Any) -> Any:
        return self._pool.submit(what, *given).result(START_TIMEOUT_S)


class Elsewhere(_Elsewhere):
    """A `PatchEngine`."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec, "open_patching")
        self.num_layers: int = self.value("num_layers")
        self.d_model: int = self.value("d_model")

    def residuals(self, sequences: Chunk, layers: Sequence[int]) -> list[dict[int, Tensor]]:
        return self.call("residuals", sequences, layers)

    def patched(
        self, sequences: Chunk, edits: Sequence[Sequence[Replacement]], tokens: Sequence[int]
    ) -> Tensor:
        return self.call("patched", sequences, edits, tokens)


class EngineElsewhere(_Elsewhere):
    """An `Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec, "open")
        self.sites: dict[int, SAEInfo] = self.value("sites")
        self.sae_input: str = self.value("sae_input")

    def run(self, what: Pass, sequences: Chunk) -> dict[int, bytes]:
        return self.call("run", what, sequences)

    def run_each(
        self, what: Callable[[], Pass], chunks: Iterable[Chunk]
    ) -> Iterator[dict[int, bytes]]:
        return iter(self._do(_run_each, [(what(), chunk) for chunk in chunks]))


class _Tokenizer:
    def __init__(self, engine: Elsewhere) -> None:
        self._engine = engine

    def encode(self, text: str) -> list[int]:
        return self._engine.call("tokenizer.encode", text)

    def decode(self, ids: list[int]) -> str:
        return self._engine.call("tokenizer.decode", ids)


def _open(spec: EngineSpec, how: str, environ: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    _opened.append(getattr(spec, how)())


def _value(name: str) -> Any:
    return operator.attrgetter(name)(_opened[0])


def _call(name: str, given: bytes) -> bytes:
    return pickle.dumps(_value(name)(*pickle.loads(given)))


def _run_each(given: list[tuple[Pass, Chunk]]) -> list[dict[int, bytes]]:
    passes = iter([what for what, _ in given])
    return list(_opened[0].run_each(lambda: next(passes), [chunk for _, chunk in given]))
