"""`neuroscope doctor`: do model, SAEs and calibrations fit? By their headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from neuroscope_vllm.cli.doctor_check import Asked, Check, Section, cut
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError, DownloadError, NeuroscopeError

if TYPE_CHECKING:
    from neuroscope_vllm.core.calibration import Calibration
    from neuroscope_vllm.core.sae.formats import Format, Located
    from neuroscope_vllm.core.sae.info import SAEInfo


HUB_TIMEOUT_S = 5.0


class Shape(NamedTuple):
    """Of the model, as its config.json says."""

    architecture: str
    d_model: int
    num_layers: int


class Known(NamedTuple):
    """An SAE that could be read, and its calibration, if there is one that fits; `cached`: its
    files, if it is one of the hub."""

    source: str
    info: SAEInfo
    calibration: Calibration | None
    cached: tuple[Located, Format] | None


def model_checks(asked: Asked) -> tuple[list[Check], list[Known]]:
    section = Section("model", "model", "architecture", "sae", "fit", "sae_model", "calibration")
    known: list[Known] = []
    reason = _look(section, asked, known)
    return section.done(reason), known


def _look(section: Section, asked: Asked, known: list[Known]) -> str:
    """Returns why checks that were not made were not."""
    shape = _model(section, asked)
    settings = asked.observing
    if asked.settings is None:
        return "the settings can not be read"
    if settings is None:
        return "no SAE is given"
    if asked.model is None and "gemma-scope" in settings.sae:
        return "no MODEL is given, of which gemma-scope would have an SAE"
    try:
        from neuroscope_vllm.core.sae.observed import named  # imports torch

        settings = named(settings, asked.model or "")
    except NeuroscopeError as error:
        section.fail("sae", *cut(error, "Give an SAE of this model."))
        return "there is no SAE"
    except (ImportError, OSError) as error:
        section.fail(
            "sae",
            f"torch, which reads SAEs, can not be imported ({error}).",
            "Install the torch that the section versions asks for.",
        )
        return "torch can not be imported"
    for number, source in enumerate(settings.sae):
        if (found := _sae(section, source)) is not None:
            info, cached = found
            _fit(section, settings, number, info, shape)
            _sae_model(section, info, asked.model)
            calibration = _calibration(section, settings, number, info, asked.model)
            known.append(Known(source, info, calibration, cached))
    return "no SAE could be read"


def _model(section: Section, asked: Asked) -> Shape | None:
    if asked.model is None:
        section.skip("model", "no MODEL is given")
        section.skip("architecture", "no MODEL is given")
        return None
    try:
        shape = read_shape(asked.model)
    except NeuroscopeError as error:
        otherwise = "Give the folder of a model, or a repository that you can read."
        section.fail("model", *cut(error, otherwise))
        section.skip("architecture", "the model can not be read")
        return None
    section.ok("model", f"{asked.model}: {shape.num_layers} layers, d_model {shape.d_model}")
    if asked.backend != "vllm":
        section.ok("architecture", f"{shape.architecture}; the backend finds its layers at start")
        return shape
    from neuroscope_vllm.engine.vllm.models import SERVED

    if shape.architecture in SERVED:
        section.ok("architecture", shape.architecture)
    else:
        section.fail(
            "architecture",
            f"{shape.architecture} is not observed; {', '.join(SERVED)} are.",
            "Serve a model of one of those, or try --backend transformers.",
        )
    return shape


def read_shape(model: str) -> Shape:
    """From a folder, or the hub, which is asked where the cache has it not.

    Raises:
        ConfigError: There is no config.json, or it names no sizes.
        DownloadError: The hub did not give it: gated, missing, or out of reach.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() or model.startswith(("/", ".", "~")):
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"model {model} is no folder with a config.json; give the folder where transformers"
                " saved one, or a repository of the hub."
            )
    else:
        from neuroscope_vllm.core.sharing.repository import Repository, fetch_file

        try:
            path = fetch_file(Repository(model), "config.json", cached=True)
        except DownloadError:
            _check_hub(f"model {model}")
            path = fetch_file(Repository(model), "config.json")
    try:
        config = json.loads(path.read_bytes())
        text = config.get("text_config") or config
        return Shape(config["architectures"][0], text["hidden_size"], text["num_hidden_layers"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is no configuration of a decoder (architectures, hidden_size,"
            " num_hidden_layers); give a causal language model."
        ) from None


def _sae(section: Section, source: str) -> tuple[SAEInfo, tuple[Located, Format] | None] | None:
    from neuroscope_vllm.core.sae.hub import is_hub_uri
    from neuroscope_vllm.core.sae.load import read_sae_info

    cached = None
    try:
        if not is_hub_uri(source):
            info = read_sae_info(source)
        elif (cached := _cached(source)) is not None:
            located, format = cached
            info = format.read_info(located).info
        else:
            section.warn(
                "sae",
                f"it is not in the local cache; the hub has {_on_the_hub(source)} there.",
                "Run neuroscope pull once, or let the server fetch it at its start.",
                source,
            )
            return None
    except NeuroscopeError as error:
        section.fail("sae", *cut(error, "Give the folder of a complete SAE."), subject=source)
        return None
    layer = "no layer recorded" if info.layer is None else f"layer {info.layer}"
    section.ok(
        "sae", f"{info.format}, {info.width} features of d_model {info.d_model}, {layer}", source
    )
    return info, cached


def _cached(source: str) -> tuple[Located, Format] | None:
    """An SAE of the hub that is in the local cache, without asking the hub. Raises SAEError."""
    from huggingface_hub import try_to_load_from_cache

    from neuroscope_vllm.core.sae.formats import FORMATS, Located
    from neuroscope_vllm.core.sae.hub import parse_address

    address = parse_address(source)
    for format in FORMATS.values():
        found = {
            name: try_to_load_from_cache(
                address.repo, str(address.folder / name), revision=address.revision
            )
            for name in format.all_files
        }
        paths = {name: Path(path) for name, path in found.items() if isinstance(path, str)}
        if paths.keys() >= set(format.files):
            return Located(source, paths, None), format
    return None


def _on_the_hub(source: str) -> str:
    """Names of the files there. Raises DownloadError: gated, missing, or out of reach."""
    from neuroscope_vllm.core.sae.hub import list_folder

    _check_hub(f"SAE {source}")
    return ", ".join(list_folder(source, None))


def _check_hub(wanted: str) -> None:
    """Raise UnreachableError within seconds; the hub's own client tries for half a minute."""
    import httpx
    from huggingface_hub import constants

    from neuroscope_vllm.core.errors import UnreachableError

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    if why is None:
        try:
            httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        except httpx.HTTPError as error:
            why = f"{constants.ENDPOINT} does not answer: {error}"
    if why is not None:
        raise UnreachableError(
            f"{wanted} is not in the local cache and can not be fetched ({why}); fetch it once with"
            " a network (`neuroscope pull`), or give a local folder."
        )


def _fit(
    section: Section, settings: Settings, number: int, info: SAEInfo, shape: Shape | None
) -> None:
    from neuroscope_vllm.core.sae.info import check_fits, check_served

    layer = settings.layer[number] if settings.layer else info.layer
    try:
        check_served(info)
        if layer is None:
            raise ConfigError(f"SAE {info.source} does not record its layer; give one with layer.")
        if shape is None:
            section.skip("fit", "the model is not known", info.source)
            return
        check_fits(info, d_model=shape.d_model, num_layers=shape.num_layers, layer=layer)
    except NeuroscopeError as error:
        section.fail("fit", *cut(error, "Choose an SAE of this model."), subject=info.source)
        return
    section.ok("fit", f"reads layer {layer} of {shape.num_layers}, d_model both", info.source)


def _sae_model(section: Section, info: SAEInfo, model: str | None) -> None:
    from neuroscope_vllm.core.sae.observed import same_model

    if model is None or info.model_name is None:
        what = "no MODEL is given" if model is None else "the SAE does not say what it was made on"
        section.skip("sae_model", what, info.source)
    elif same_model(info.model_name, model) or _tuned(model, info.model_name):
        section.ok("sae_model", f"made on {info.model_name}", info.source)
    else:
        section.warn(
            "sae_model",
            f"made on {info.model_name}, and this is {model}.",
            "See that it is the same model, or what the self-test at start and neuroscope calibrate"
            " say of the variance explained.",
            info.source,
        )


def _tuned(model: str, base: str) -> bool:
    """Whether a model is named as tuned from another, as gemma-2-2b-it is."""
    name, of = (one.rstrip("/").rpartition("/")[2].casefold() for one in (model, base))
    return name.startswith(f"{of}-")


def _calibration(
    section: Section, settings: Settings, number: int, info: SAEInfo, model: str | None
) -> Calibration | None:
    from neuroscope_vllm.core.sae.observed import calibration_of, same_model

    make = f"Make one: neuroscope calibrate {model or 'MODEL'} --sae {settings.sae[number]}."
    try:
        found = calibration_of(settings, number, info)
    except NeuroscopeError as error:
        section.fail("calibration", *cut(error, make), subject=info.source)
        return None
    if found is None:
        section.warn(
            "calibration",
            "there is none, so features are ranked by activation and attention sinks not known.",
            make,
            info.source,
        )
        return None
    path, calibration = found
    made_on = f"{path}, made on {calibration.model or 'an unnamed model'}"
    if model is not None and not same_model(calibration.model, model):
        section.warn("calibration", f"{made_on}, and this is {model}.", make, info.source)
    else:
        section.ok("calibration", made_on, info.source)
    return calibration
