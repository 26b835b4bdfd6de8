"""`neuroscope doctor`: are the ports free, and if not, who has them?"""

from __future__ import annotations

import errno
import socket
from urllib.parse import urlsplit

import httpx

from neuroscope_vllm.cli.doctor_check import Asked, Check, Section, cut
from neuroscope_vllm.cli.doctor_server import health_of
from neuroscope_vllm.core.access import key_digests, vllm_keys
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import NeuroscopeError
from neuroscope_vllm.core.launch import check_bind, url_host

TIMEOUT_S = 3.0
NEUROSCOPE, CHAT, OTHER = "a neuroscope", "an OpenAI server", "something else"


def port_checks(asked: Asked, running: bool) -> list[Check]:
    """`running`: whether the server at `asked.url` answers as a neuroscope."""
    section = Section("ports", "features_port", "chat_port", "bind")
    settings = asked.settings or Settings()
    host, port = settings.features_host, settings.features_port
    _port(section, "features_port", host, port, NEUROSCOPE if running else None, "--features-port")
    chat = urlsplit(asked.chat_url)
    if chat.hostname in ("127.0.0.1", "localhost", "::1"):
        # vLLM listens on every address unless told otherwise.
        wide = "0.0.0.0" if chat.hostname != "::1" else "::"
        chat_port = chat.port or (443 if chat.scheme == "https" else 80)
        _port(section, "chat_port", wide, chat_port, CHAT if running else None, "--port")
    else:
        section.skip("chat_port", f"{asked.chat_url} is of another machine")
    try:
        check_bind(settings, key_digests(settings, vllm_keys()))
    except NeuroscopeError as error:
        section.fail("bind", *cut(error, "Use features_host 127.0.0.1 and a tunnel (ssh -L)."))
    else:
        section.ok("bind", f"features are served on {host}")
    return section.done()


def _port(
    section: Section, name: str, host: str, port: int, expected: str | None, flag: str
) -> None:
    """`expected`: who may have it."""
    refused = _not_bound(host, port)
    if refused is None:
        section.ok(name, f"{port} is free")
        return
    if refused.errno != errno.EADDRINUSE:
        section.fail(
            name,
            f"{host} port {port} can not be bound: {refused.strerror}.",
            f"Choose another port with {flag}, or an address of this machine.",
        )
        return
    holder = who(f"http://{url_host(_reachable(host))}:{port}")
    if holder == expected:
        section.ok(name, f"{port} is taken by {holder}, the running server")
    else:
        section.fail(
            name,
            f"{port} is taken by {holder}.",
            f"Stop it (ss -ltnp 'sport = :{port}' names it), or choose another port with {flag}.",
        )


def _not_bound(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def who(url: str) -> str:
    """What listens there, by what it answers."""
    try:
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
            if health_of(client, url) is not None:
                return NEUROSCOPE
            version = client.get(f"{url}/version")
            told = version.json() if version.status_code == 200 else None
            if isinstance(told, dict) and "version" in told:
                return CHAT
            # Keys guard all of a chat server but this.
            asked_for_key = client.get(f"{url}/v1/models").status_code in (200, 401)
            return CHAT if asked_for_key else OTHER
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return OTHER
