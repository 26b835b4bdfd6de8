"""What one caller may read of the hub."""

from __future__ import annotations

from dataclasses import dataclass

from neuroscope_vllm.core.access import is_among


@dataclass(frozen=True, slots=True)
class Rights:
    """Attributes:
    everything: Admins read all requests, whatever their secret.
    lists: It need not name a request: the stream of all, and the list of those kept.
    names: It reads requests without a secret, if it can name them.
    metrics: It reads the metrics.
    shown: Digests of the stream secrets that it showed.
    who: With whom it shares what one caller may take: all that show its key, by its digest, or all
        without a key; None: what it may take has no share.
    """

    everything: bool = False
    lists: bool = False
    names: bool = False
    metrics: bool = False
    shown: frozenset[bytes] = frozenset()
    who: bytes | None = None

    def may_read(self, secret: bytes | None) -> bool:
        """Whether it reads a request whose secret has this digest; None: one without."""
        if self.everything:
            return True
        if secret is None:
            return self.names
        return is_among(secret, self.shown)


ALL = Rights(everything=True, lists=True, names=True, metrics=True)
