"""How far the hub is behind, measured where it happens."""

from __future__ import annotations

import time

from prometheus_client import Histogram

from neuroscope_vllm.core import wire

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MAX_LAG_S = 3600.0


class Lags:
    """Histograms of seconds.

    Attributes:
        hub: From an engine's message being ready to the hub having told it to readers.
        loop: How late the event loop comes to what is due.
    """

    def __init__(self) -> None:
        self.hub = Histogram(
            "neuroscope_hub_lag_seconds",
            "From a step's tokens or features being ready in the engine to the hub having made"
            " them events: both queues, the socket and the hub's own work. Of an ipc:// hub alone:"
            " engines of a tcp:// hub may be on other hosts, whose clocks can not be compared.",
            buckets=BUCKETS_S,
            registry=None,
        )
        self.loop = Histogram(
            "neuroscope_event_loop_lag_seconds",
            "How late the side process's event loop came to what was due, measured four times a"
            " second.",
            buckets=BUCKETS_S,
            registry=None,
        )

    def handled(self, message: wire.StepFeatures | wire.TokensSampled) -> None:
        """Takes note of a message from this host, which the hub has just handled."""
        if message.sent_at is not None:
            # Whatever a message says: one NaN or infinity would stay in the sum for ever.
            self.hub.observe(min(max(0.0, time.monotonic() - message.sent_at), MAX_LAG_S))
