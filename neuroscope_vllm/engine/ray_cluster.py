"""A Ray cluster: connecting to one or starting one, and how many workers of what it can hold."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from neuroscope_vllm.core.access import SECRET_VARIABLES
from neuroscope_vllm.core.config import API_KEY_VARIABLE
from neuroscope_vllm.core.errors import ConfigError, EngineError
from neuroscope_vllm.engine.spec import EngineSpec

ADDRESS_VARIABLE = "RAY_ADDRESS"
_SENT = ("NEUROSCOPE_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "VLLM_")
_OF_ONE_HOST = {"VLLM_HOST_IP", "VLLM_HOST_PORT", "VLLM_CPU_OMP_THREADS_BIND"}
_KEYS = {API_KEY_VARIABLE, *SECRET_VARIABLES}
"""No worker of a corpus pass needs them."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Workers, and what each takes.

    Attributes:
        gpus: GPUs a worker; 0: it runs on CPU cores.
        cpus: Cores a worker.
        parts: Processes of each engine (tensor and pipeline parallelism).
    """

    workers: int
    gpus: int
    cpus: int
    parts: int


def connect(address: str | None) -> tuple[Any, bool]:
    """Ray, connected to the cluster at `address`, else at $RAY_ADDRESS, else to a new one.

    A new one listens on loopback only, shows no dashboard, sends no usage statistics, and ends
    with this process.

    Args:
        address: `host:port`, or `auto` for the one that runs on this machine.

    Returns:
        The module, and whether it is for us to disconnect.

    Raises:
        ConfigError: Ray is not installed, or that is no address.
        EngineError: No cluster answers there, or none could be started.
    """
    address = address or os.environ.get(ADDRESS_VARIABLE)
    if address and not re.fullmatch(r"auto|(ray://)?[^\s/]+:\d{1,5}", address):
        raise ConfigError(
            f"--ray {address}: that is no address of a Ray cluster; write host:port or auto, and"
            " MODEL before --ray."
        )
    if not address:
        # Ray's switch for systems that ask the user before a program may listen. Without it every
        # host that reaches this one could talk to the cluster. Read when ray is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--ray needs Ray, which can not be imported ({error}); pip install"
            " 'neuroscope-vllm[ray]'."
        ) from None
    if ray.is_initialized():
        return ray, False
    if address and address != "auto":
        _check_answers(address)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, num_cpus=_num_cores(), **quiet)
    # Ray raises what its parts raise: ConnectionError, RuntimeError, ValueError, its own.
    except Exception as error:
        what = f"no Ray cluster at {address} took us" if address else "Ray did not start"
        raise EngineError(
            f"{what} ({first_line(error)}); see `ray status`, or leave --ray out."
        ) from error
    _hush(ray)
    return ray, True


def _check_answers(address: str) -> None:
    """Raises EngineError if nothing does. Ray itself asks for minutes."""
    name, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((name.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"no Ray cluster answers at {address} ({error}); see `ray status` there, or leave the"
            " address out for one on this machine."
        ) from None


def _hush(ray: Any) -> None:
    """Ray prints notices, such as of a worker's death, to stdout, where a command's answer goes."""
    ray._private.worker._worker_logs_enabled = False


def plan(spec: EngineSpec, workers: int | None, nodes: Sequence[Mapping[str, float]]) -> Plan:
    """How many workers, and what each takes.

    Args:
        workers: Asked for; None: one for each GPU (or each group of GPUs that an engine spans), or
            without GPUs two a node.
        nodes: Resources of each node, by Ray's names.

    Raises:
        ConfigError: So many do not fit.
    """
    parts = _processes(spec.vllm_flags) if spec.backend == "vllm" else 1
    gpus = [int(node.get("GPU", 0)) for node in nodes] if spec.backend == "vllm" else []
    if any(gpus):
        room = sum(count // parts for count in gpus)
        _check_room(workers, room, f"{sum(gpus)} GPUs, {parts} a worker")
        return Plan(workers=workers or room, gpus=parts, cpus=1, parts=parts)
    cores = [int(count) for node in nodes if (count := node.get("CPU", 0)) >= 1]
    room = sum(cores)
    _check_room(workers, room, f"{room} cores, one a worker at least")
    workers = workers or min(2 * len(cores), room)
    # As many for each as lets all of them find a place.
    each = next(
        n
        for n in range(room // workers, 0, -1)
        if sum(count // n for count in cores) >= workers
    )  # fmt: skip
    return Plan(workers=workers, gpus=0, cpus=each, parts=parts)


def _check_room(workers: int | None, room: int, have: str) -> None:
    if (workers or 1) > room:
        raise ConfigError(
            f"{workers or 1} workers do not fit the Ray cluster, which has {have}; ask for"
            f" {room} at most with --workers, or add nodes."
            if room
            else f"the Ray cluster has {have}: too few for one; add nodes."
        )


def sent_environment() -> dict[str, str]:
    """This process's variables that count for an engine on any host."""
    return {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(_SENT) or name == "OMP_NUM_THREADS")
        and name not in _OF_ONE_HOST | _KEYS
    }


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processes(vllm_flags: Sequence[str]) -> int:
    """GPUs that an engine with these flags spans. What is wrong in them is for vLLM to say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1)
    dashed = [
        name.replace("_", "-") + equals + value
        for name, equals, value in (flag.partition("=") for flag in vllm_flags)
    ]
    try:
        given = parser.parse_known_args(dashed)[0]
    except argparse.ArgumentError:
        return 1
    return max(1, given.tensor_parallel_size * given.pipeline_parallel_size)
