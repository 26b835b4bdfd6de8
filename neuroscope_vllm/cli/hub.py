"""`neuroscope hub`: the side process alone, where no `vllm serve` starts it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from neuroscope_vllm.cli.options import neuroscope_flags, settings_from
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError, NeuroscopeError


@click.command("hub", epilog="Takes the same settings as the engines, so one file serves all.")
@click.argument("model")
@neuroscope_flags
@click.option("--upstream", help="vLLM's URL, for the pass-through of chats.")
def command(model: str, **flags: Any) -> None:
    """Collect features of engines that were started elsewhere, and stream them.

    MODEL, a folder or a repository of the Hugging Face hub, gives the tokenizer. Engines connect
    to --hub, as their own setting `hub` says; over TCP all need the file of --hub-keys.

    An --api-key of vLLM is not seen from here: users' key is the one in VLLM_API_KEY, admins' are
    in --admin-keys-file. Without either, features are for this machine alone.
    """
    from neuroscope_vllm.core import access, launch
    from neuroscope_vllm.core.keys import hub_endpoint
    from neuroscope_vllm.core.sae.canonical import SUITE
    from neuroscope_vllm.server.__main__ import run

    settings = settings_from(flags)
    try:
        endpoint = hub_endpoint(settings)
        if endpoint is None:
            raise ConfigError(
                "no hub was given: the address to listen on, for example --hub"
                " tcp://10.0.0.1:8082 or --hub ipc:///run/user/1000/neuroscope.sock."
            )
        if SUITE in settings.sae:  # labels are kept by the SAE's own address
            from neuroscope_vllm.core.sae.observed import named

            settings = named(settings, model)
        keys = access.key_digests(settings, access.vllm_keys())
        for name in access.SECRET_VARIABLES:
            os.environ.pop(name, None)  # its children have no use for them
        launch.check_side(settings, keys)
        listener = launch.listen(settings.features_host, settings.features_port)
        config = launch.SideConfig(
            settings=settings,
            endpoint=endpoint,
            model=model,
            tokenizer_file=str(tokenizer_file(model)),
            upstream=settings.upstream,
            labels=launch.label_files(settings, _layers(settings)),
            model_source=model,
            keys=keys,
        )
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    # Also where a shell started us ignoring it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(config, listener)
    except KeyboardInterrupt:
        sys.exit(130)


def _layers(settings: Settings) -> list[int]:
    """Layers in the order of `settings.sae`. Raises ConfigError if an SAE records none."""
    if settings.layer:
        return settings.layer
    layers = []
    for source in settings.sae:
        from neuroscope_vllm.core.sae import read_sae_info

        layer = read_sae_info(source).layer
        if layer is None:
            raise ConfigError(f"SAE {source} does not record its layer; give one with layer.")
        layers.append(layer)
    return layers


def tokenizer_file(model: str) -> Path:
    """The model's tokenizer.json, fetched if need be. Raises ConfigError if there is none."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = Path(model).expanduser()
    if folder.is_dir():
        if (path := folder / "tokenizer.json").is_file():
            return path
        raise ConfigError(
            f"{model} has no tokenizer.json; give a model with a fast tokenizer, or the folder"
            " where transformers saved one."
        )
    try:
        return Path(hf_hub_download(model, "tokenizer.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{model} is no folder here, and its tokenizer.json could not be fetched ({reason});"
            " give a local folder, or a repository that you can read."
        ) from None
