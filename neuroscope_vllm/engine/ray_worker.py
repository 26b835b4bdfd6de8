"""The worker's half of Ray: one engine in a process of its own, on its share of the host's cores.

Knows nothing of Ray. Imports no torch before the cores are bound: OpenMP reads its settings when it
is loaded.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.engine.spec import EngineSpec

if TYPE_CHECKING:
    from neuroscope_vllm.core.passes import Pass
    from neuroscope_vllm.engine.protocol import Chunk, Engine


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's part of its host's cores: number `rank` of `workers` equal ones.

    Attributes:
        parts: Processes that the engine itself divides them among (tensor parallelism).
    """

    rank: int
    workers: int
    parts: int = 1


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of itself, in which all workers must agree.

    Attributes:
        identity, sites, sae_input, max_tokens: See `engine.protocol.Engine`.
        digests: Of the weights of each layer's SAE.
    """

    identity: str
    sites: dict[int, SAEInfo]
    sae_input: str
    max_tokens: int
    digests: dict[int, str]


class RayWorker:
    """An engine that is opened when it is first needed."""

    def __init__(self, spec: EngineSpec, environment: Mapping[str, str], folder: str) -> None:
        """
        Args:
            environment: The driver's variables that count for the engine.
            folder: The driver's working directory, from where paths may lead.
        """
        self._spec = spec
        self._share: Share | None = None
        self._engine: Engine | None = None
        self._report: Report | None = None
        os.environ.update(environment)
        self._threads = environment.get("OMP_NUM_THREADS")
        with contextlib.suppress(OSError):
            os.chdir(folder)

    def host(self) -> str:
        """Workers with the same answer share cores."""
        return socket.gethostname()

    def place(self, share: Share) -> None:
        """Keep to a share of the cores, once the engine is opened."""
        self._share = share

    def open(self, agreed: Report | None = None) -> Report:
        """Open the engine, if it is not.

        Args:
            agreed: What it has to report.

        Raises:
            ConfigError: It reports something else.
            NeuroscopeError: It can not be opened.
        """
        if self._report is None:
            if self._share is not None:
                self._bind(self._share)
            self._engine = self._spec.open()
            self._report = report(self._engine)
        check_agrees(self.host(), self._report, agreed or self._report)
        return self._report

    def tokenizer(self) -> Any:
        assert self._engine is not None
        return self._engine.tokenizer

    def run(self, agreed: Report, what: Pass, sequences: Chunk) -> dict[int, bytes]:
        self.open(agreed)
        assert self._engine is not None
        return self._engine.run(what, sequences)

    def _bind(self, share: Share) -> None:
        """Keep this thread, and all that it starts from now on, to its share of the cores."""
        mine = cores_of(share)
        if hasattr(os, "sched_setaffinity"):  # not on a Mac
            os.sched_setaffinity(0, mine)
        threads = max(1, len(mine) // share.parts)
        # Ray has set OMP_NUM_THREADS for itself. In one process vLLM reads nothing else; its worker
        # processes it binds by the other, by default ("auto") to one NUMA node each.
        os.environ["OMP_NUM_THREADS"] = self._threads or str(threads)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
            ",".join(str(core) for core in mine[part * threads :][:threads] or mine)
            for part in range(share.parts)
        )


def cores_of(share: Share) -> list[int]:
    """The cores of a share; one at least, also where there are more workers than cores."""
    cores = _cores()
    size = max(1, len(cores) // share.workers)
    return sorted({cores[(share.rank * size + i) % len(cores)] for i in range(size)})


def _cores() -> list[int]:
    """Logical CPUs that this process may use, those of one physical core, and of one socket, next
    to each other."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))

    def place(cpu: int) -> tuple[int, int, int]:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            socket_, core = (
                int((folder / name).read_text()) for name in ("physical_package_id", "core_id")
            )
        except (OSError, ValueError):  # not shown in some containers
            return 0, 0, cpu
        return socket_, core, cpu

    return sorted(os.sched_getaffinity(0), key=place)


def report(engine: Engine) -> Report:
    """What `engine` says of itself; runs one token to see the SAEs' weights."""
    from neuroscope_vllm.core.passes import CalibrationPass

    one = engine.run(CalibrationPass(special_ids=[]), [[0]])
    return Report(
        identity=engine.identity,
        sites=engine.sites,
        sae_input=engine.sae_input,
        max_tokens=engine.max_tokens,
        digests={layer: CalibrationPass.read(r).sae_digest for layer, r in one.items()},
    )


def check_agrees(host: str, found: Report, agreed: Report) -> None:
    """Raises ConfigError where the engine of a host is not like the others."""
    for name in Report.__struct_fields__:
        mine, theirs = getattr(found, name), getattr(agreed, name)
        if mine != theirs:
            raise ConfigError(
                f"the Ray worker on {host} has another {_NAMES[name]} than the others"
                f" ({mine}, not {theirs}); give all hosts the same files (times included) and"
                " versions."
            )


_NAMES = {
    "identity": "model or version",
    "sites": "SAE",
    "sae_input": "sae_input",
    "max_tokens": "limit of tokens",
    "digests": "SAE",
}
