"""The server's process: `python -m neuroscope_vllm.engine.hf.serve SPEC`, a `ServeSpec` as JSON."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys

import msgspec

from neuroscope_vllm.core import access, launch
from neuroscope_vllm.core.errors import ConfigError, NeuroscopeError
from neuroscope_vllm.core.keys import check_reachable, hub_endpoint
from neuroscope_vllm.engine.hf.serve.spec import ServeSpec


def main() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Before torch is loaded. Where MPS lacks an operation, the CPU does it, and PyTorch says so.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    spec = msgspec.json.decode(sys.argv[1], type=ServeSpec)
    try:
        serve(spec)
    except NeuroscopeError as error:
        sys.exit(f"neuroscope: {error}")


def serve(spec: ServeSpec) -> None:
    """Until it is told to end. Raises NeuroscopeError, one sentence."""
    settings = spec.settings
    hub = hub_endpoint(settings)
    check_reachable(settings)
    listener, keys = None, access.KeyDigests()
    vllm_keys = access.vllm_keys()
    door = _listen(spec)  # before the model: a taken port should not cost its download
    if hub is None:
        keys = access.key_digests(settings, vllm_keys)
        launch.check_side(settings, keys)
        listener = launch.listen(settings.features_host, settings.features_port)

    import uvicorn

    try:
        from neuroscope_vllm.engine.hf.serve import app, loading
    except (ImportError, NameError) as error:  # transformers' modules name what they did not find
        raise ConfigError(
            f"transformers' server can not be imported ({error}); pip install"
            " 'neuroscope-vllm[hf]', which has the versions that fit and what they need."
        ) from None

    loaded = loading.load(spec)
    directory = launch.runtime_directory()
    endpoint = hub or launch.endpoint_of(directory)
    if hub is None:
        assert listener is not None
        side = launch.launch(
            settings,
            model=spec.name,
            directory=directory,
            listener=listener,
            tokenizer_file=loaded.tokenizer_file(directory),
            upstream=settings.upstream or f"http://{launch.url_host(_own(spec.host))}:{spec.port}",
            labels=launch.label_files(settings, loaded.layers_in_order),
            model_source=spec.model,
            keys=keys,
        )
        atexit.register(side.stop)
    served = loaded.connect(endpoint)
    application = app.build(served, api_keys=vllm_keys, origins=spec.allowed_origins)
    config = uvicorn.Config(application, log_level="info", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[door])


def _listen(spec: ServeSpec) -> socket.socket:
    try:
        return launch.listen(spec.host, spec.port)
    except ConfigError:
        raise ConfigError(
            f"port {spec.port} on {spec.host} can not be had; another process may hold it, so stop"
            " that one, or choose another with --port."
        ) from None


def _own(host: str) -> str:
    return "127.0.0.1" if host in ("", "0.0.0.0", "::") else host


if __name__ == "__main__":
    main()
