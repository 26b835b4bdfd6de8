"""Keys of a hub that engines reach over TCP, and the endpoint that names their file. Torch-free.

CURVE encrypts, and proves both ends to each other. One file holds both secrets: the hub reads it
on its host, every engine process on its own. Only the file's path travels in vLLM's configuration,
which vLLM logs; no secret does.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import zmq

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError

WILDCARDS = ("*", "0.0.0.0", "[::]")
REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
"""What a socket's monitor may call it; the last where the other end hung up first."""


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two CURVE secret keys in Z85, 40 characters each; the public ones follow from them."""

    hub: str
    engine: str

    def __post_init__(self) -> None:
        for secret in (self.hub, self.engine):
            zmq.curve_public(secret.encode())  # a ZMQError if it is no key

    def __repr__(self) -> str:
        return "Keys(...)"  # never in a log or a traceback

    def arm_hub(self, socket: zmq.Socket[bytes]) -> None:
        """Encrypt what comes to a socket that will bind."""
        socket.curve_server = True
        socket.curve_secretkey = self.hub.encode()

    def arm_engine(self, socket: zmq.Socket[bytes]) -> None:
        """Show the engine's key, and send only to who holds the hub's."""
        socket.curve_serverkey = zmq.curve_public(self.hub.encode())
        socket.curve_secretkey = self.engine.encode()
        socket.curve_publickey = zmq.curve_public(self.engine.encode())

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this public key is an engine of ours; zmq.auth's provider."""
        return key == zmq.curve_public(self.engine.encode())


def create_keys(path: Path) -> None:
    """Write new keys, readable by their owner only. Raises ConfigError, also if the file exists."""
    (_, hub), (_, engine) = zmq.curve_keypair(), zmq.curve_keypair()
    keys = Keys(hub.decode(), engine.decode())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"key file {path} exists; remove it first, or write the new keys to another file."
        ) from None
    except OSError as error:
        raise ConfigError(f"key file {path} can not be written: {error.strerror}.") from None
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.encode(keys) + b"\n")


def load_keys(path: Path) -> Keys:
    """Raises ConfigError if the file is missing, readable by others, or not a key file."""
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(4096)
    except FileNotFoundError:
        raise ConfigError(
            f"key file {path} does not exist on this host; make one with `neuroscope keys` and copy"
            " it to the hub's host and to every engine's."
        ) from None
    except OSError as error:
        raise ConfigError(f"key file {path} can not be read: {error.strerror}.") from None
    if mode & 0o077:
        raise ConfigError(
            f"key file {path} can be read by other users (mode {mode & 0o777:o}) and is a secret;"
            f" run chmod 600 {path}."
        )
    try:
        return msgspec.json.decode(content, type=Keys)
    except (msgspec.MsgspecError, zmq.ZMQError, ValueError):
        # Not the cause: it could quote the file.
        raise ConfigError(
            f"key file {path} is not one that `neuroscope keys` wrote; make a new one, or copy it"
            " again."
        ) from None


def hub_endpoint(settings: Settings) -> str | None:
    """The hub's address with its key file, `tcp://host:port#/path`, or plain `ipc://…`.

    None if no hub is set. `~` stays, each host has its own. Raises ConfigError as `load_keys`.
    """
    if settings.hub is None or settings.hub_keys is None:
        return settings.hub
    path = settings.hub_keys
    endpoint = f"{settings.hub}#{path if path.startswith('~') else os.path.abspath(path)}"
    read_endpoint(endpoint)
    return endpoint


def read_endpoint(endpoint: str) -> tuple[str, Keys | None]:
    """The ZMQ address, and the keys from their file on this host. Raises ConfigError."""
    if not endpoint.startswith("tcp://"):
        return endpoint, None
    address, _, path = endpoint.partition("#")
    return address, load_keys(Path(path))


def check_reachable(settings: Settings) -> None:
    """Raise ConfigError if `hub` is where a hub listens but nothing can connect to."""
    host = (settings.hub or "").removeprefix("tcp://").rpartition(":")[0]
    if host in WILDCARDS:
        raise ConfigError(
            f"hub is {settings.hub}, which means every address of a machine and none to connect to;"
            " give engines one address of the hub's host."
        )
