"""What a user can configure, and where it comes from: flags > environment > YAML file.

`Settings` is the one schema behind `neuroscope serve` flags, the `NEUROSCOPE_*` variables, the
YAML file and `--additional-config '{"neuroscope": {...}}'`. Unknown keys are refused by name.
Torch-free; reading a file or the environment happens only when asked.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from neuroscope_vllm.core.artefacts import DATA_VARIABLE
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae.canonical import SUITE

ENV_PREFIX = "NEUROSCOPE_"
CONFIG_FILE_VARIABLE = "NEUROSCOPE_CONFIG"
RUNTIME_VARIABLE = "NEUROSCOPE_RUNTIME"
"""Set by us for child processes: the running side process's directory."""
CACHE_VARIABLE = "NEUROSCOPE_CACHE"
ADMIN_KEYS_VARIABLE = "NEUROSCOPE_ADMIN_KEYS"
METRICS_KEYS_VARIABLE = "NEUROSCOPE_METRICS_KEYS"
KEYS_VARIABLES = (ADMIN_KEYS_VARIABLE, METRICS_KEYS_VARIABLE)
"""Of the front process, which hands digests on."""
API_KEY_VARIABLE = "NEUROSCOPE_API_KEY"
"""The key that clients show; no business of servers."""
_NOT_SETTINGS = {
    CONFIG_FILE_VARIABLE,
    RUNTIME_VARIABLE,
    CACHE_VARIABLE,
    DATA_VARIABLE,
    *KEYS_VARIABLES,
    API_KEY_VARIABLE,
}
_SERVICE_LINK = re.compile(
    r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_\w+)=.*|(\w+_)?PORT=\w+://.*"
)
"""What Kubernetes tells every pod of a service: of one called neuroscope-features, for example
NEUROSCOPE_FEATURES_PORT=tcp://10.0.0.1:8081."""
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:\d{1,5})?")

Ranking = Literal["zscore", "tail", "quantile", "activation"]
Redact = Literal["none", "text"]
"""What is left out of a recording; `text`: the texts and ids of tokens."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a user may set. Empty `sae` means: not configured, do nothing at all."""

    sae: list[str] = []
    """SAE files, folders or hf:// addresses, one per observed layer."""
    layer: list[int] = []
    """Layer of each SAE, zero-indexed; empty: as the SAE itself records."""
    calibration: list[str] = []
    """Calibration file of each SAE; empty: `calibration.safetensors` beside it, if there."""
    labels: list[str] = []
    """Label files (JSONL) of the first SAE; empty: all that `neuroscope labels` lists for each."""
    sae_input: Literal["raw", "rms"] = "raw"
    """What the SAE reads: raw residuals, or residuals divided by their RMS."""
    top_k: int = 8
    """Features reported per token."""
    ranking: Ranking | None = None
    """Order of a token's features; default `zscore` with a calibration, else `activation`."""
    max_frequency: float = 0.5
    """Features firing on more than this share of calibration tokens are not ranked."""
    features_host: str = "127.0.0.1"
    features_port: int = 8081
    admin_keys_file: str | None = None
    """File, mode 600, of keys that read everything, one a line; more in NEUROSCOPE_ADMIN_KEYS."""
    metrics_keys_file: str | None = None
    """The same of keys that read /metrics alone; more in NEUROSCOPE_METRICS_KEYS."""
    allowed_origins: list[str] = []
    """Origins of pages elsewhere that may ask the features port, with a key in their requests."""
    upstream: str | None = None
    """vLLM's own base URL, for the chat pass-through; default: as vLLM was started."""
    hub: str | None = None
    """Endpoint of a side process that runs apart (ipc:// or tcp://); default: start one."""
    hub_keys: str | None = None
    """Key file of a tcp:// hub, on each host; `neuroscope keys` makes one."""
    steering: str | None = None
    """File with an operator's presets, directions, rules and limits of steering."""
    guide: str | None = None
    """File with messages that the page suggests."""
    trace_requests: int = 512
    """Finished requests kept for replay."""
    memory_mb: int = 256
    """Ceiling of what the hub keeps, MiB: traces, and the three parts below."""
    ring_mb: int | None = None
    """Of it, for the stream of all requests; default: a quarter."""
    prefix_mb: int | None = None
    """Of it, for features of prompts that vLLM may serve from its prefix cache; default: a
    quarter."""
    running_mb: int | None = None
    """Of it, for requests that run, and rows that wait for theirs or for other pipeline stages;
    default: an eighth."""
    max_readers: int = 2048
    """Streams read at the same time."""

    record: str | None = None
    """Folder where finished requests are recorded; default: nothing is."""
    record_rate: float = 1.0
    """Share of requests that are recorded."""
    record_days: int = 0
    """Days that recorded requests are kept; 0: for ever."""
    record_redact: Redact = "none"
    """`text`: record features without the texts and ids of tokens."""
    otel: bool = False
    """Export a log event per request and rule hit over OTLP; OTEL_* variables say where."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= 128:
            raise ConfigError(f"top_k is {self.top_k}; it must lie between 1 and 128.")
        if not 0 < self.max_frequency <= 1:
            raise ConfigError(
                f"max_frequency is {self.max_frequency}; it must lie above 0 and at most 1."
            )
        for name in ("trace_requests", "memory_mb", "max_readers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        _check_parts(self)
        if not 0 < self.record_rate <= 1:
            raise ConfigError(
                f"record_rate is {self.record_rate}; it must lie above 0 and at most 1."
            )
        if self.record_days < 0:
            raise ConfigError(f"record_days is {self.record_days}; days kept, or 0 for ever.")
        _check_hub(self.hub, self.hub_keys)
        if not 0 <= self.features_port <= 65535:
            raise ConfigError(f"features_port is {self.features_port}; ports end at 65535.")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allowed_origins has {origin!r}; name each page's origin as browsers do, for"
                    " example https://app.example.org."
                )
        for name in ("layer", "calibration"):
            given = getattr(self, name)
            if given and len(given) != len(self.sae):
                raise ConfigError(
                    f"{len(given)} {name} for {len(self.sae)} SAEs; give one {name} per sae."
                )
        if len(set(self.layer)) != len(self.layer):
            raise ConfigError(f"layer {self.layer} names a layer twice; one SAE reads one layer.")

    @property
    def configured(self) -> bool:
        return bool(self.sae)

    def ranking_of(self, calibrated: bool) -> Ranking:
        """The ranking of an SAE that has a calibration or not."""
        return self.ranking or ("zscore" if calibrated else "activation")


class Parts(msgspec.Struct, frozen=True):
    """How `memory_mb` is divided, in bytes."""

    traces: int
    ring: int
    prefix: int
    running: int


def parts_of(settings: Settings) -> Parts:
    """Of a hub with these settings."""
    memory = settings.memory_mb << 20
    given = (settings.ring_mb, settings.prefix_mb, settings.running_mb)
    ring, prefix, running = (
        memory // usual if mb is None else mb << 20
        for mb, usual in zip(given, (4, 4, 8), strict=True)
    )
    return Parts(memory - ring - prefix - running, ring, prefix, running)


def _check_parts(settings: Settings) -> None:
    for name in ("ring_mb", "prefix_mb", "running_mb"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    if parts_of(settings).traces < 1:
        raise ConfigError(
            f"memory_mb is {settings.memory_mb}, which ring_mb, prefix_mb and running_mb leave"
            " nothing of for finished requests; give memory_mb more, or them less."
        )


def _check_hub(hub: str | None, keys: str | None) -> None:
    if hub is None or hub.startswith("ipc://"):
        if keys is not None:
            raise ConfigError(
                f"hub_keys is {keys} but hub is {hub or 'not given'}; keys are for a tcp:// hub, so"
                " give one, or leave hub_keys out."
            )
        return
    if not hub.startswith("tcp://"):
        raise ConfigError(f"hub is {hub!r}; an endpoint begins with ipc:// or tcp://.")
    address = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.]+\]|[\w.*-]+):(\d{1,5})", hub)
    if address is None or not 1 <= int(address[2]) <= 65535:
        raise ConfigError(
            f"hub is {hub!r}; write tcp://host:port, for example tcp://10.0.0.1:8082."
        )
    if keys is None:
        raise ConfigError(
            f"hub is {hub} but hub_keys is not given, and without keys anyone there could send and"
            " listen; make a key file with `neuroscope keys` and name it in hub_keys."
        )


_FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}
_LISTS = {name for name, field in _FIELDS.items() if field.default_factory is list}


def asked_for(flags: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Whether anything names an SAE or a file that may; other variables of our prefix are no
    reason to interfere."""
    return bool(flags) or any(environ.get(ENV_PREFIX + name) for name in ("SAE", "CONFIG"))


def resolve(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    file: str | os.PathLike[str] | None = None,
) -> Settings:
    """What `merge` finds, as Settings. Raises ConfigError, one sentence, on anything wrong."""
    merged = merge(flags, environ, file)
    if merged.get("sae") == [SUITE]:  # it has one of each layer
        merged["sae"] = [SUITE] * max(len(merged.get("layer", [])), 1)
    try:
        return msgspec.convert(merged, Settings, strict=False)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        raise ConfigError(f"neuroscope configuration: {error}.") from None


def merge(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    file: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """`flags` over NEUROSCOPE_* variables over a YAML file; values as they are there.

    The file is `file`, else the flag `config`, else $NEUROSCOPE_CONFIG. Single values are
    accepted where a list is expected. Raises ConfigError, one sentence: no such name, or file.
    """
    flags = dict(flags or {})
    path = file or flags.pop("config", None) or environ.get(CONFIG_FILE_VARIABLE)
    merged = read_yaml(Path(path)) if path else {}
    merged.update(from_environment(environ))
    merged.update(_checked_keys(flags, "the neuroscope configuration"))
    for name in _LISTS & merged.keys():
        if not isinstance(merged[name], list | tuple):
            merged[name] = [merged[name]]
    return merged


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for a child that is told its settings otherwise, or has none."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(ENV_PREFIX) or name in (CACHE_VARIABLE, DATA_VARIABLE)
    }


def settings_dict(settings: Settings) -> dict[str, Any]:
    """The settings that differ from the defaults, as plain values."""
    return {
        name: value
        for name, value in msgspec.to_builtins(settings).items()
        if value != (field := _FIELDS[name]).default
        and not (field.default_factory is not msgspec.NODEFAULT and value == [])
    }


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """NEUROSCOPE_SAE and friends; lists are comma-separated. Kubernetes' own are left out."""
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _NOT_SETTINGS or not text:
            continue
        name = variable.removeprefix(ENV_PREFIX)
        if _SERVICE_LINK.fullmatch(f"{name}={text}"):
            continue
        name = name.lower()
        _checked_keys([name], f"the environment variable {variable}")
        values[name] = [part.strip() for part in text.split(",")] if name in _LISTS else text
    return values


def read_yaml(
    path: Path, known: Collection[str] = tuple(_FIELDS), what: str = "config file"
) -> dict[str, Any]:
    """A YAML file of `name: value` lines. Raises ConfigError, one sentence on `what` it is."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{what} {path} can not be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError) as error:  # as of a date that there is not
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(f"{what} {path} is not valid YAML{line}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {path} must hold `name: value` lines.")
    return dict(_checked_keys(content, f"{what} {path}", known))


def _checked_keys(values: Any, where: str, known: Collection[str] = tuple(_FIELDS)) -> Any:
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
            raise ConfigError(f"{where} has an unknown key {name!r}; {hint}")
    return values


def cache_dir() -> Path:
    """Where the demo's model and what Neuronpedia gave live: $NEUROSCOPE_CACHE, else the user's
    cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "neuroscope"


def unwritable_cache(error: OSError) -> ConfigError:
    """For who could not keep something there."""
    return ConfigError(
        f"the cache {cache_dir()} can not be written ({error.strerror or error}); make room there,"
        f" or name another folder with {CACHE_VARIABLE}."
    )
