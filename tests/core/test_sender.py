"""The sender against a real socket that is bound late, as a hub's is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.sender import Sender


@pytest.mark.parametrize("late", [0.0, 0.02, 0.1, 0.3])
def test_the_hub_knows_whom_it_hears(tmp_path: Path, late: float) -> None:
    """A request of an unknown sender would never end, should that sender leave at once."""
    address = f"ipc://{tmp_path}/hub.sock"
    hello = wire.Hello("me", "scheduler", "engine", 0, "model")
    sender = Sender(address, lambda counters: hello)
    sender.start()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as hub:
        hub.setsockopt(zmq.RCVTIMEO, 10_000)
        time.sleep(late)
        hub.bind(address)
        heard: list[wire.Message] = []
        until = time.monotonic() + 10
        while len(heard) < 2 and time.monotonic() < until:
            sender.put(wire.RequestScheduled("request", 0))
            time.sleep(0.0005)
            if hub.poll(0):
                heard.append(wire.decode(hub.recv_multipart()[-1]))
        sender.close()
        while not isinstance(heard[-1], wire.Goodbye):
            heard.append(wire.decode(hub.recv_multipart()[-1]))
    assert isinstance(heard[0], wire.Hello)
    assert isinstance(heard[1], wire.RequestScheduled)
