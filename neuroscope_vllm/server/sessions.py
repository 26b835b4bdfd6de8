"""Sessions of browsers, which can show a key in a cookie only."""

from __future__ import annotations

import secrets
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from neuroscope_vllm.core.access import digest
from neuroscope_vllm.server.rights import Rights

LASTS_S = 12 * 3600
MOST = 1024
SHARE = 4
"""One key may have a quarter of them."""


@dataclass(frozen=True, slots=True)
class Session:
    """What its keys and secrets gave it. `vllm_key`, one of vLLM's own in clear, is for the chats
    of the page; it stays in memory, and dies with the session."""

    rights: Rights
    vllm_key: str | None = field(default=None, repr=False)
    ends_at: float = field(default_factory=lambda: time.monotonic() + LASTS_S)


class Sessions:
    """By digests of their ids; those that began first give way when there are too many, of one key
    or of all. `sessions_displaced` counts those that would have lasted longer."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._by_digest: OrderedDict[bytes, Session] = OrderedDict()

    def begin(self, session: Session) -> str:
        """Its id, which is not kept."""
        now = time.monotonic()
        for id_ in [id_ for id_, one in self._by_digest.items() if one.ends_at <= now]:
            del self._by_digest[id_]
        self._make_room(session.rights.who)
        session_id = secrets.token_urlsafe(32)
        self._by_digest[digest(session_id)] = session
        return session_id

    def _make_room(self, who: bytes | None) -> None:
        theirs = [id_ for id_, one in self._by_digest.items() if one.rights.who == who]
        if who is not None and len(theirs) >= MOST // SHARE:
            del self._by_digest[theirs[0]]
        elif len(self._by_digest) >= MOST:
            self._by_digest.popitem(last=False)
        else:
            return
        self._counters["sessions_displaced"] += 1

    def get(self, session_id: str | None) -> Session | None:
        session = self._by_digest.get(digest(session_id)) if session_id else None
        return session if session is not None and session.ends_at > time.monotonic() else None

    def end(self, session_id: str | None) -> None:
        if session_id:
            self._by_digest.pop(digest(session_id), None)
