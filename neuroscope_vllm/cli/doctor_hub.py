"""`neuroscope doctor`: does the hub that is set take what an engine here would send?"""

from __future__ import annotations

import time

from neuroscope_vllm.cli.doctor_check import Section, cut
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import NeuroscopeError

HANDSHAKE_S = 3.0


def hub_check(section: Section, settings: Settings | None) -> None:
    """Connects as an engine does, with its keys, and sends nothing."""
    from neuroscope_vllm.core.keys import check_reachable, hub_endpoint

    if settings is None:
        section.skip("hub", "the settings can not be read")
        return
    try:
        endpoint = hub_endpoint(settings)
        if endpoint is None:
            section.skip("hub", "no hub is set, so the server starts its own side process")
            return
        check_reachable(settings)
        said = shake_hands(endpoint)
    except NeuroscopeError as error:
        section.fail("hub", *cut(error, "Copy hub_keys from the hub's host."))
        return
    if said == "accepted":
        section.ok("hub", f"{settings.hub} takes what engines here send")
    elif said == "refused":
        section.fail(
            "hub",
            f"{settings.hub} refuses the key in {settings.hub_keys}.",
            "Copy the key file of the hub's host here, and give it as hub_keys.",
        )
    else:
        section.fail(
            "hub",
            f"nothing answers as a hub at {settings.hub} within {HANDSHAKE_S:g} s.",
            "Start it there with neuroscope hub; over TCP, see that no firewall is between.",
        )


def shake_hands(endpoint: str) -> str:
    """ "accepted", "refused", or "silent". Raises ConfigError: the key file can not be used."""
    import zmq
    from zmq.utils.monitor import recv_monitor_message

    from neuroscope_vllm.core.keys import REFUSED, read_endpoint

    address, keys = read_endpoint(endpoint)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        if keys is not None:
            keys.arm_engine(socket)
            socket.setsockopt(zmq.IPV6, 1)
        with socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | REFUSED) as monitor:
            socket.connect(address)
            deadline = time.monotonic() + HANDSHAKE_S
            said = "silent"
            while (left := deadline - time.monotonic()) > 0 and monitor.poll(int(1000 * left)):
                event = recv_monitor_message(monitor)["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    said = "accepted"
                    break
                said = "refused"  # or hung up just now: it is asked again until the time is over
            socket.disable_monitor()
    return said
